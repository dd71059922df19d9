//! What a process took, as the kernel says in `/proc`.

use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant},
};

use anyhow::Context;

/// Time on a processor of the threads that the process has now.
///
/// From `schedstat`, which counts nanoseconds; `stat` counts hundredths of a second.
pub(crate) fn cpu(pid: u32) -> anyhow::Result<Duration> {
    let mut nanos = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = thread?.path().join("schedstat");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        nanos += text.split(' ').next().unwrap_or_default().parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanos))
}

/// Most memory the process ever had, in KiB.
pub(crate) fn peak_memory_kib(pid: u32) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM in /proc")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Server processes, and what they had taken at one moment.
#[derive(Debug)]
pub(crate) struct Backends {
    taken: BTreeMap<u32, Duration>,
    at: Instant,
}

impl Backends {
    pub(crate) fn of(pids: impl Iterator<Item = i32>) -> anyhow::Result<Self> {
        let taken =
            pids.map(|pid| Ok((pid.unsigned_abs(), cpu(pid.unsigned_abs())?))).collect::<anyhow::Result<_>>()?;
        Ok(Self { taken, at: Instant::now() })
    }

    /// What they took since then; all of it for one that is new.
    pub(crate) fn since(&self, before: &Self) -> Duration {
        let of_one = |(pid, taken): (&u32, &Duration)| *taken - before.taken.get(pid).copied().unwrap_or_default();
        self.taken.iter().map(of_one).sum()
    }

    /// The same as percent of one processor.
    pub(crate) fn percent_since(&self, before: &Self) -> f64 {
        percent(self.since(before), self.at - before.at)
    }
}

pub(crate) fn percent(taken: Duration, of: Duration) -> f64 {
    taken.as_secs_f64() * 100.0 / of.as_secs_f64()
}
