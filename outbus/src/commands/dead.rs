//! `outbus dead`

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use bus_core::{Event, Seq};
use outbox::{DeadRest, DeadRow, LogAdmin, RequestKind, Selected};
use serde::Serialize;

use crate::{
    cli::{DatabaseArgs, DeadCommand, DeadSelection, Format},
    config::Config,
    failure::Failure,
    output::{self, Table, cut, printable},
};

/// Rows read at once.
const PAGE: usize = 500;
/// What is said where no event is meant.
const NOTHING: &str = "nothing is set aside";
/// Pause between two looks at whether a request is done.
const LOOK: Duration = Duration::from_millis(50);

/// A set-aside event, as JSON has it.
#[derive(Serialize)]
struct Dead {
    id: String,
    seq: u64,
    sink: String,
    topic: String,
    key: Option<String>,
    r#type: String,
    state: &'static str,
    reason: String,
    error: String,
    attempts: u32,
    time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    event: Option<Event>,
    #[serde(skip_serializing_if = "Option::is_none")]
    row: Option<InvalidRow>,
}

/// What else stands in a row that is no valid event, by the names of its columns.
#[derive(Serialize)]
struct InvalidRow {
    /// Why it is none.
    problem: String,
    source: String,
    subject: Option<String>,
    content_type: String,
    extensions: Option<String>,
    time: String,
    /// Where it is text.
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<String>,
    /// Where it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    data_base64: Option<String>,
}

#[derive(Serialize)]
struct DeadList {
    dead: Vec<Dead>,
}

/// What became of a retry or a discard, per sink.
#[derive(Serialize)]
struct Outcomes {
    requests: Vec<Outcome>,
}

#[derive(Serialize)]
struct Outcome {
    sink: String,
    /// The request's number, where a relay was asked.
    request: Option<i64>,
    /// `done`, or `open` while no relay has done it.
    state: &'static str,
    done: u64,
    failed: u64,
}

pub(super) async fn run(config: &Config, command: DeadCommand, format: Format) -> Result<(), Failure> {
    match command {
        DeadCommand::List(args) => {
            let admin = open(config, &args.database).await?;
            let selected = Selected { reason: args.reason, ..Selected::default() };
            list(&*admin, &selected, args.sink.as_deref(), false, format).await.map(drop)
        }
        DeadCommand::Show(selection) => {
            let admin = open(config, &selection.database).await?;
            let shown = list(&*admin, &selected(&selection)?, selection.sink.as_deref(), true, format).await?;
            all_found(&selection, &shown)
        }
        DeadCommand::Retry(args) => {
            ask(config, &args.selection, RequestKind::Retry, args.rate, args.wait.wait, format).await
        }
        DeadCommand::Discard(args) => {
            ask(config, &args.selection, RequestKind::Discard, None, args.wait.wait, format).await
        }
    }
}

async fn open(config: &Config, args: &DatabaseArgs) -> Result<Arc<dyn LogAdmin>, Failure> {
    config.database(args.database.as_deref())?.admin().await
}

fn selected(selection: &DeadSelection) -> Result<Selected, Failure> {
    let ids = (!selection.ids.is_empty()).then(|| selection.ids.clone());
    if ids.is_none() && selection.reason.is_none() && !selection.all {
        return Err(Failure::usage("selection", "which events? Name them by their ids, or use --all or --reason"));
    }
    Ok(Selected { ids, reason: selection.reason.clone(), ..Selected::default() })
}

/// Calls `take` for every row that is meant, page by page.
async fn for_each(
    admin: &dyn LogAdmin,
    selected: &Selected,
    sink: Option<&str>,
    mut take: impl FnMut(DeadRow) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut after: Option<(String, Seq)> = None;
    loop {
        let from = after.as_ref().map(|(sink, seq)| (sink.as_str(), *seq));
        let page = admin.dead_letters(selected, from, PAGE).await?;
        let Some(last) = page.last() else { return Ok(()) };
        after = Some((last.sink.clone(), last.seq));
        for row in page.into_iter().filter(|row| sink.is_none_or(|sink| row.sink == sink)) {
            take(row)?;
        }
    }
}

/// Writes the rows; answers the ids that there were.
async fn list(
    admin: &dyn LogAdmin,
    selected: &Selected,
    sink: Option<&str>,
    whole: bool,
    format: Format,
) -> Result<BTreeSet<String>, Failure> {
    let mut dead = Vec::new();
    for_each(admin, selected, sink, |row| {
        dead.push(entry(row, whole));
        Ok(())
    })
    .await?;
    let list = DeadList { dead };
    // Of ids that were named and are not there, an error tells.
    if format == Format::Json || !list.dead.is_empty() || selected.ids.is_none() {
        output::result(format, &list, |list| if whole { details(list) } else { table(list) })?;
    }
    Ok(list.dead.into_iter().map(|dead| dead.id).collect())
}

fn entry(row: DeadRow, whole: bool) -> Dead {
    let (event, invalid) = match row.event {
        Ok(event) => (Some(event), None),
        Err(invalid) => (None, row.columns.rest.map(|rest| invalid_row(invalid.error.to_string(), rest))),
    };
    Dead {
        id: row.columns.id,
        seq: row.seq.0,
        sink: row.sink,
        topic: row.columns.topic,
        key: row.columns.key,
        r#type: row.columns.event_type,
        state: row.state.as_str(),
        reason: row.reason,
        error: row.error,
        attempts: row.attempts,
        time: row.at.to_string(),
        event: event.filter(|_| whole),
        row: invalid.filter(|_| whole),
    }
}

fn invalid_row(problem: String, rest: DeadRest) -> InvalidRow {
    let DeadRest { source, subject, content_type, extensions, time, data } = rest;
    let (data, data_base64) = match String::from_utf8(data) {
        Ok(text) => (Some(text), None),
        Err(error) => (None, Some(BASE64.encode(error.as_bytes()))),
    };
    InvalidRow { problem, source, subject, content_type, extensions, time, data, data_base64 }
}

fn table(list: &DeadList) -> String {
    if list.dead.is_empty() {
        return NOTHING.to_owned();
    }
    let mut table = Table::new(&["id", "sink", "topic", "key", "type", "state", "reason", "attempts", "error"]);
    for dead in &list.dead {
        table.row(vec![
            dead.id.clone(),
            dead.sink.clone(),
            cut(&dead.topic),
            dead.key.as_deref().map_or_else(|| "-".to_owned(), cut),
            cut(&dead.r#type),
            dead.state.to_owned(),
            dead.reason.clone(),
            dead.attempts.to_string(),
            dead.error.clone(),
        ]);
    }
    table.render()
}

fn details(list: &DeadList) -> String {
    if list.dead.is_empty() {
        return NOTHING.to_owned();
    }
    let detail = |dead: &Dead| {
        let Dead { id, sink, seq, state, reason, error, attempts, time, .. } = dead;
        let mut lines = vec![
            id.clone(),
            format!("  sink {sink}, place {seq}, {state} since {time}, {attempts} attempts"),
            format!("  {reason}: {error}"),
        ];
        lines.extend(dead.event.as_ref().map(|event| format!("  {}", event.to_json())));
        lines.extend(dead.row.iter().flat_map(|row| columns(dead, row)));
        lines.iter().map(|line| printable(line)).collect::<Vec<_>>().join("\n")
    };
    list.dead.iter().map(detail).collect::<Vec<_>>().join("\n")
}

/// A row that is no valid event, a line per column, so that an operator can see what it was meant to be.
fn columns(dead: &Dead, row: &InvalidRow) -> Vec<String> {
    let columns = [
        ("topic", Some(&dead.topic)),
        ("key", dead.key.as_ref()),
        ("type", Some(&dead.r#type)),
        ("source", Some(&row.source)),
        ("subject", row.subject.as_ref()),
        ("content_type", Some(&row.content_type)),
        ("extensions", row.extensions.as_ref()),
        ("time", Some(&row.time)),
        ("data", row.data.as_ref()),
        ("data_base64", row.data_base64.as_ref()),
    ];
    let mut lines = vec![format!("  no valid event: {}", row.problem)];
    let set = columns.iter().filter_map(|(name, value)| value.map(|value| format!("    {name:<12}  {value}")));
    lines.extend(set);
    lines
}

/// An id that was named and is not there is a failure.
fn all_found(selection: &DeadSelection, found: &BTreeSet<String>) -> Result<(), Failure> {
    match selection.ids.iter().find(|id| !found.contains(*id)) {
        Some(id) => Err(Failure::runtime("not_found", format!("no event with id {id} is set aside"))),
        None => Ok(()),
    }
}

async fn ask(
    config: &Config,
    selection: &DeadSelection,
    kind: RequestKind,
    rate: Option<u32>,
    wait: Duration,
    format: Format,
) -> Result<(), Failure> {
    let selected = selected(selection)?;
    let admin = open(config, &selection.database).await?;
    let (mut found, mut per_sink) = (BTreeSet::new(), BTreeMap::<String, u64>::new());
    for_each(&*admin, &selected, selection.sink.as_deref(), |row| {
        found.insert(row.columns.id);
        *per_sink.entry(row.sink).or_default() += 1;
        Ok(())
    })
    .await?;
    all_found(selection, &found)?;
    let mut requests = Vec::new();
    for sink in per_sink.into_keys() {
        requests.push(ask_sink(&*admin, sink, kind, &selected, rate).await?);
    }
    let deadline = Instant::now() + wait;
    for outcome in &mut requests {
        follow(&*admin, outcome, deadline).await?;
    }
    let outcomes = Outcomes { requests };
    output::result(format, &outcomes, |outcomes| outcomes_text(outcomes, kind))?;
    match outcomes.requests.iter().map(|outcome| outcome.failed).sum::<u64>() {
        0 => Ok(()),
        failed => {
            Err(Failure::runtime("refused", format!("{failed} events were refused again; `outbus dead list` says why")))
        }
    }
}

/// Discards at once where no relay runs; asks the sink's owner otherwise.
async fn ask_sink(
    admin: &dyn LogAdmin,
    sink: String,
    kind: RequestKind,
    selected: &Selected,
    rate: Option<u32>,
) -> Result<Outcome, Failure> {
    if kind == RequestKind::Discard
        && let Some(done) = admin.discard_unowned(&sink, selected).await?
    {
        return Ok(Outcome { sink, request: None, state: "done", done, failed: 0 });
    }
    let request = admin.ask(&sink, kind, selected, rate).await?;
    Ok(Outcome { sink, request: Some(request), state: "open", done: 0, failed: 0 })
}

/// Waits until a request is done, if a relay is there to do it.
async fn follow(admin: &dyn LogAdmin, outcome: &mut Outcome, deadline: Instant) -> Result<(), Failure> {
    let Some(request) = outcome.request else { return Ok(()) };
    loop {
        if let Some(progress) = admin.progress(request).await? {
            (outcome.done, outcome.failed) = (progress.done, progress.failed);
            if progress.ended {
                outcome.state = "done";
                return Ok(());
            }
        }
        let owned = admin.sinks().await?.iter().any(|sink| sink.sink == outcome.sink && sink.owner.is_some());
        if !owned || Instant::now() >= deadline {
            return Ok(());
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn outcomes_text(outcomes: &Outcomes, kind: RequestKind) -> String {
    if outcomes.requests.is_empty() {
        return NOTHING.to_owned();
    }
    let verb = match kind {
        RequestKind::Retry => "published again",
        RequestKind::Discard => "discarded",
    };
    let text = |outcome: &Outcome| {
        let Outcome { sink, request, done, failed, state } = outcome;
        let mut text = format!("sink {sink}: {done} {verb}");
        if *failed > 0 {
            text += &format!(", {failed} refused again");
        }
        match request {
            Some(request) if *state == "open" => {
                text += &format!(
                    "; request {request} is not done yet: the sink's relay does it, or the next one that starts"
                );
            }
            _ => {}
        }
        text
    };
    outcomes.requests.iter().map(text).collect::<Vec<_>>().join("\n")
}
