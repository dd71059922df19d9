-- The log: one row per event, appended in the business transaction and never updated.
CREATE TABLE {p}outbox (
  -- Place in the log. AUTOINCREMENT: a number is never used again, so a cursor can rely on it.
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  -- Event id, 1 to 255 bytes. The default is a random UUID, for plain SQL.
  id TEXT NOT NULL DEFAULT (lower(
    hex(randomblob(4)) || '-' || hex(randomblob(2)) || '-4' || substr(hex(randomblob(2)), 2) || '-' ||
    substr('89AB', 1 + (abs(random()) % 4), 1) || substr(hex(randomblob(2)), 2) || '-' || hex(randomblob(6)))),
  -- Where the event goes.
  topic TEXT NOT NULL,
  -- Events of a topic with equal keys keep their order; NULL is a key of its own.
  key TEXT,
  -- What happened, in the past tense.
  type TEXT NOT NULL,
  -- Who made the event, a URI reference.
  source TEXT NOT NULL DEFAULT '/outbus',
  -- What it happened to.
  subject TEXT,
  -- Media type of the data.
  content_type TEXT NOT NULL DEFAULT 'application/json',
  -- Further attributes, a JSON object of strings; NULL for none.
  extensions TEXT,
  -- When it happened, microseconds since 1970 in UTC.
  time INTEGER NOT NULL DEFAULT (CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER) * 1000),
  -- The payload.
  data BLOB NOT NULL,
  CHECK (length(CAST(data AS BLOB)) <= {event_bytes_max}),
  -- A row that is no valid event is set aside, not refused; but nobody reads a gigabyte for that.
  CHECK (length(CAST(id AS BLOB)) + length(CAST(topic AS BLOB)) + coalesce(length(CAST(key AS BLOB)), 0)
    + length(CAST(type AS BLOB)) + length(CAST(source AS BLOB)) + coalesce(length(CAST(subject AS BLOB)), 0)
    + length(CAST(content_type AS BLOB)) + coalesce(length(CAST(extensions AS BLOB)), 0) <= 1048576)
);

-- One row per log: its identity, and what its janitor knows.
CREATE TABLE {p}log (
  name TEXT PRIMARY KEY,
  -- Identifies the log in the world, so that two services that publish to one topic never share a position.
  log_id TEXT NOT NULL,
  -- Who removes settled rows, and until when (microseconds since 1970).
  janitor TEXT,
  janitor_until INTEGER NOT NULL DEFAULT 0,
  -- When every sink had settled how much: [[microseconds, place], ...], ascending.
  settled_marks TEXT NOT NULL DEFAULT '[]',
  -- The highest epoch of a sink that was removed: no later one begins below it.
  epoch_floor INTEGER NOT NULL DEFAULT 0
);

-- One row per sink that reads a log. Written by its owner at checkpoints only, never per event.
CREATE TABLE {p}cursor (
  log TEXT NOT NULL REFERENCES {p}log (name),
  sink TEXT NOT NULL,
  -- Everything up to here is settled.
  low INTEGER NOT NULL,
  -- The highest place seen, and the id of the event there.
  high INTEGER NOT NULL,
  high_id TEXT,
  -- What between them is not settled: [[first, last], ...].
  holes TEXT NOT NULL DEFAULT '[]',
  -- Where the writer stands in its broker.
  sink_pos TEXT,
  -- Ascends with every owner; a write under a lower one changes nothing.
  epoch INTEGER NOT NULL DEFAULT 0,
  -- Who owns it, <host>:<pid>, and until when (microseconds since 1970).
  owner TEXT,
  lease_until INTEGER NOT NULL DEFAULT 0,
  -- The history its places belong to: another one after a restore, whose numbers mean other events.
  incarnation TEXT NOT NULL,
  -- The topics the sink takes, a JSON array of patterns.
  topics TEXT NOT NULL DEFAULT '["*"]',
  -- Reserved: an operator stopped it.
  paused INTEGER NOT NULL DEFAULT 0,
  -- What it publishes to, for people.
  bus TEXT,
  -- What is held up, for people: {"keys": n, "topics": [...]}.
  blocked TEXT NOT NULL DEFAULT '{"keys":0,"topics":[]}',
  PRIMARY KEY (log, sink)
) WITHOUT ROWID;

-- Events that a sink has set aside. The event is copied, for its row in the log may go.
CREATE TABLE {p}dead_letter (
  log TEXT NOT NULL,
  sink TEXT NOT NULL,
  seq INTEGER NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('parked', 'dead', 'retrying')),
  -- Whether its key waits for it, also while it is retried.
  parked INTEGER NOT NULL CHECK (parked IN (0, 1)),
  reason TEXT NOT NULL,
  error TEXT NOT NULL,
  attempts INTEGER NOT NULL,
  -- When it was set aside, microseconds since 1970.
  at INTEGER NOT NULL,
  id TEXT NOT NULL, topic TEXT NOT NULL, key TEXT, type TEXT NOT NULL, source TEXT NOT NULL, subject TEXT,
  content_type TEXT NOT NULL, extensions TEXT, time INTEGER NOT NULL, data BLOB NOT NULL,
  PRIMARY KEY (log, sink, seq)
);

-- A key's set-aside events in order: loaded by a new owner, drained by a retry.
CREATE INDEX {p}dead_letter_key ON {p}dead_letter (log, sink, topic, key, seq) WHERE parked = 1;

-- What operators ask of a sink's owner, who alone executes it.
CREATE TABLE {p}request (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  log TEXT NOT NULL,
  sink TEXT NOT NULL,
  kind TEXT NOT NULL CHECK (kind IN ('retry', 'discard')),
  -- Which set-aside events, a JSON object.
  arguments TEXT NOT NULL,
  -- At most so many events a second.
  rate INTEGER,
  state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'ended')),
  done INTEGER NOT NULL DEFAULT 0,
  failed INTEGER NOT NULL DEFAULT 0,
  at INTEGER NOT NULL
);

-- The requests that are still to be done.
CREATE INDEX {p}request_open ON {p}request (log, sink, id) WHERE state = 'open';

-- Events that a consumer of this service has handled.
CREATE TABLE {p}inbox (
  consumer TEXT NOT NULL,
  source TEXT NOT NULL,
  id TEXT NOT NULL,
  -- When, microseconds since 1970.
  at INTEGER NOT NULL,
  PRIMARY KEY (consumer, source, id)
) WITHOUT ROWID;

-- The oldest entries, which are removed.
CREATE INDEX {p}inbox_at ON {p}inbox (at);
