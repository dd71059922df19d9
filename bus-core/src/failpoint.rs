//! Named points at which a test kills the process. They do something with the feature `failpoints` only.

/// The variable that names the point at which the process is killed: `<name>`, or `<name>:<n>` for the n-th time it is
/// reached.
#[cfg(feature = "failpoints")]
pub const FAILPOINT_VARIABLE: &str = "OUTBUS_FAILPOINT";

/// A named point of the road. Nothing happens here, unless a test said so.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn failpoint(_name: &'static str) {}

/// A named point of the road: kills the process where [`FAILPOINT_VARIABLE`] names it, as `kill -9` from outside would at
/// just this moment.
#[cfg(feature = "failpoints")]
pub fn failpoint(name: &'static str) {
    use std::sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    };

    static CHOSEN: LazyLock<Option<(String, AtomicU64)>> = LazyLock::new(|| {
        let chosen = std::env::var(FAILPOINT_VARIABLE).ok()?;
        let (name, times) = chosen.split_once(':').unwrap_or((&chosen, "1"));
        Some((name.to_owned(), AtomicU64::new(times.parse().expect("a number behind the failpoint's name"))))
    });
    if let Some((chosen, left)) = &*CHOSEN
        && chosen == name
        && left.fetch_sub(1, Ordering::SeqCst) == 1
    {
        let killed = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        unreachable!("the process outlives its end at {name}: {killed:?}");
    }
}
