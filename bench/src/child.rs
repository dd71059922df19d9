//! A relay in a process of its own: this program once more, which says line by line what happens to it.

use std::{
    env,
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    sync::Once,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use outbox::{Relay, RelayEvent};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc::{UnboundedReceiver, unbounded_channel},
};

use crate::{
    noting::NotingBus,
    process::peak_memory_kib,
    relay_memory::{SINK, config},
    road::outbox_of,
};

/// How long a line may take.
const DEADLINE: Duration = Duration::from_secs(120);

/// What such a process is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The outbox's tables.
    schema: String,
    /// What its connections are called on the server.
    name: String,
    /// Ends when it has caught up.
    #[arg(long)]
    once: bool,
}

/// Says `standby`, `owner` and `published` when each happens first, and `peak <KiB>` in the end.
pub(crate) async fn relay(args: &Args) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let log = outbox_of(&args.schema, &args.name)?.log(SINK).await?;
    let published = Once::new();
    let bus = NotingBus::new(move |_| published.call_once(|| say("published")));
    let (standby, owner) = (Once::new(), Once::new());
    let mut relay = Relay::new(log, bus, config())?.observe(move |event| match event {
        RelayEvent::Standby { .. } => standby.call_once(|| say("standby")),
        RelayEvent::Owner { .. } => owner.call_once(|| say("owner")),
        _ => {}
    });
    let shutdown = async move {
        terminate.recv().await;
    };
    if args.once {
        relay.run_once(shutdown).await?
    } else {
        relay.run(shutdown).await?
    };
    say(&format!("peak {}", peak_memory_kib(std::process::id())?));
    Ok(())
}

fn say(line: &str) {
    // Whoever started it may be gone.
    let _gone = writeln!(std::io::stdout(), "{line}");
}

/// Such a process, from outside. Dropped, it is killed.
#[derive(Debug)]
pub(crate) struct ChildRelay {
    process: Child,
    lines: UnboundedReceiver<(Instant, String)>,
}

impl ChildRelay {
    pub(crate) fn start(schema: &str, name: &str, once: bool) -> anyhow::Result<Self> {
        let mut command = Command::new(env::current_exe()?);
        command.args(["child-relay", schema, name]).args(once.then_some("--once"));
        let mut process = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let output = BufReader::new(process.stdout.take().context("its output is a pipe")?);
        let (sender, lines) = unbounded_channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send((Instant::now(), line)).is_err() {
                    return;
                }
            }
        });
        Ok(Self { process, lines })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Waits for a line that begins so; answers when it came, and its rest.
    pub(crate) async fn until(&mut self, beginning: &str) -> anyhow::Result<(Instant, String)> {
        let found = async {
            while let Some((at, line)) = self.lines.recv().await {
                if let Some(rest) = line.strip_prefix(beginning) {
                    return Ok((at, rest.trim().to_owned()));
                }
            }
            anyhow::bail!("the relay ended before it said `{beginning}`")
        };
        tokio::time::timeout(DEADLINE, found).await.with_context(|| format!("the relay never said `{beginning}`"))?
    }

    /// Sends a signal; answers when.
    pub(crate) fn signal(&mut self, name: &str) -> anyhow::Result<Instant> {
        let at = Instant::now();
        let sent = Command::new("kill").args([name, &self.pid().to_string()]).status()?;
        anyhow::ensure!(sent.success(), "the relay was gone before the signal");
        Ok(at)
    }
}

impl Drop for ChildRelay {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ended = self.process.kill();
        let _status = self.process.wait();
    }
}
