-- Places in the log. CACHE 1: a session that draws several at once would hold places back.
CREATE SEQUENCE {p}outbox_seq AS bigint CACHE 1 NO CYCLE;

-- The log: one row per event, appended in the business transaction and never updated.
CREATE TABLE {p}outbox (
  -- Place in the log. The transaction takes its number before the place is drawn: by that a reader can tell a place that
  -- was rolled back from one that is not visible yet. Nobody else may call nextval on the sequence.
  seq bigint PRIMARY KEY
    DEFAULT CASE WHEN pg_current_xact_id() IS NOT NULL THEN nextval('{p}outbox_seq'::regclass) END,
  -- When it happened.
  time timestamptz NOT NULL DEFAULT clock_timestamp(),
  -- Event id, 1 to 255 bytes. The default is a random UUID, for plain SQL.
  id text COLLATE "C" NOT NULL DEFAULT gen_random_uuid()::text,
  -- Where the event goes.
  topic text COLLATE "C" NOT NULL,
  -- Events of a topic with equal keys keep their order; NULL is a key of its own.
  key text COLLATE "C",
  -- What happened, in the past tense.
  type text COLLATE "C" NOT NULL,
  -- Who made the event, a URI reference.
  source text COLLATE "C" NOT NULL DEFAULT '/outbus',
  -- What it happened to.
  subject text COLLATE "C",
  -- Media type of the data.
  content_type text COLLATE "C" NOT NULL DEFAULT 'application/json',
  -- Further attributes, an object of strings; NULL for none.
  extensions jsonb,
  -- The payload.
  data bytea NOT NULL,
  CHECK (octet_length(data) <= {event_bytes_max}),
  -- A row that is no valid event is set aside, not refused; but nobody reads a gigabyte for that.
  CHECK (octet_length(id) + octet_length(topic) + coalesce(octet_length(key), 0) + octet_length(type)
    + octet_length(source) + coalesce(octet_length(subject), 0) + octet_length(content_type)
    + coalesce(pg_column_size(extensions), 0) <= 1048576)
) WITH (autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 1000000);

-- Payloads are compressed by nobody on the way in: publishing would only decompress them.
ALTER TABLE {p}outbox ALTER data SET STORAGE EXTERNAL;
ALTER SEQUENCE {p}outbox_seq OWNED BY {p}outbox.seq;

-- A place is drawn and never given: relays take one that nobody has drawn for the end of the log, and those below it that are
-- drawn later for rolled back. Replication and a restore of the whole table are let through.
CREATE FUNCTION {p}refuse_given_place() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'a place in the log is drawn, not given' USING ERRCODE = 'check_violation', HINT = 'Leave out seq.';
END
$$;
CREATE TRIGGER place_is_drawn BEFORE INSERT ON {p}outbox FOR EACH ROW
  WHEN (NEW.seq IS DISTINCT FROM currval('{p}outbox_seq'::regclass)) EXECUTE FUNCTION {p}refuse_given_place();

-- Appends an event from any language; answers its place. Call it last, right before COMMIT.
CREATE FUNCTION {p}append(
  topic text, type text, data text, key text DEFAULT NULL, id text DEFAULT NULL, source text DEFAULT '/outbus',
  subject text DEFAULT NULL, content_type text DEFAULT 'application/json', extensions jsonb DEFAULT NULL,
  "time" timestamptz DEFAULT NULL
) RETURNS bigint LANGUAGE sql AS $$
  INSERT INTO {p}outbox (topic, type, data, key, id, source, subject, content_type, extensions, time)
  VALUES ($1, $2, convert_to($3, 'UTF8'), $4, coalesce($5, gen_random_uuid()::text), $6, $7, $8, $9,
    coalesce($10, clock_timestamp()))
  RETURNING seq
$$;

-- One row per log: its identity, and what its janitor knows. Whoever registers a sink or removes rows locks it.
CREATE TABLE {p}log (
  name text COLLATE "C" PRIMARY KEY,
  -- Identifies the log in the world, so that two services that publish to one topic never share a position.
  log_id text NOT NULL,
  -- Who removes settled rows, and until when.
  janitor text,
  janitor_until timestamptz NOT NULL DEFAULT '-infinity',
  -- When every sink had settled how much: [[microseconds, place], ...], ascending.
  settled_marks jsonb NOT NULL DEFAULT '[]',
  -- The highest epoch of a sink that was removed: no later one begins below it.
  epoch_floor bigint NOT NULL DEFAULT 0
);

-- One row per sink that reads a log. Written by its owner at checkpoints only, never per event; half-empty pages let each
-- write stay on its page.
CREATE TABLE {p}cursor (
  log text COLLATE "C" NOT NULL REFERENCES {p}log (name),
  sink text COLLATE "C" NOT NULL,
  -- Everything up to here is settled.
  low bigint NOT NULL,
  -- The highest place seen, and the id of the event there.
  high bigint NOT NULL,
  high_id text,
  -- What between them is not settled.
  holes int8multirange NOT NULL DEFAULT '{}',
  -- Where the writer stands in its broker.
  sink_pos jsonb,
  -- Ascends with every owner; a write under a lower one changes nothing.
  epoch bigint NOT NULL DEFAULT 0,
  -- Who owns it, <host>:<pid>, and until when.
  owner text,
  lease_until timestamptz NOT NULL DEFAULT '-infinity',
  -- The history its places belong to: another one after a restore or a failover, whose numbers may mean other events.
  incarnation text NOT NULL,
  -- The server's identity and timeline when it was owned last.
  history text NOT NULL DEFAULT '',
  -- The topics the sink takes, an array of patterns.
  topics jsonb NOT NULL DEFAULT '["*"]',
  -- Reserved: an operator stopped it.
  paused boolean NOT NULL DEFAULT false,
  -- What it publishes to, for people.
  bus text,
  -- What is held up, for people: {"keys": n, "topics": [...]}.
  blocked jsonb NOT NULL DEFAULT '{"keys":0,"topics":[]}',
  PRIMARY KEY (log, sink)
) WITH (fillfactor = 10, autovacuum_vacuum_threshold = 500, autovacuum_vacuum_scale_factor = 0);

-- Events that a sink has set aside. The event is copied, for its row in the log may go.
CREATE TABLE {p}dead_letter (
  log text COLLATE "C" NOT NULL,
  sink text COLLATE "C" NOT NULL,
  seq bigint NOT NULL,
  state text NOT NULL CHECK (state IN ('parked', 'dead', 'retrying')),
  -- Whether its key waits for it, also while it is retried.
  parked boolean NOT NULL,
  reason text NOT NULL,
  error text NOT NULL,
  attempts bigint NOT NULL,
  -- When it was set aside.
  at timestamptz NOT NULL DEFAULT clock_timestamp(),
  time timestamptz NOT NULL,
  id text COLLATE "C" NOT NULL, topic text COLLATE "C" NOT NULL, key text COLLATE "C", type text COLLATE "C" NOT NULL,
  source text COLLATE "C" NOT NULL, subject text COLLATE "C", content_type text COLLATE "C" NOT NULL, extensions jsonb,
  data bytea NOT NULL,
  PRIMARY KEY (log, sink, seq)
);

-- A key's set-aside events in order, drained by a retry. By a hash: a key that is too long for an event, and for an index,
-- can be among them.
CREATE INDEX dead_letter_key ON {p}dead_letter (log, sink, hashtextextended(key, 0), seq) WHERE parked;

-- What operators ask of a sink's owner, who alone executes it.
CREATE TABLE {p}request (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  log text COLLATE "C" NOT NULL,
  sink text COLLATE "C" NOT NULL,
  kind text NOT NULL CHECK (kind IN ('retry', 'discard')),
  -- Which set-aside events.
  arguments jsonb NOT NULL,
  -- At most so many events a second.
  rate bigint,
  state text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'ended')),
  done bigint NOT NULL DEFAULT 0,
  failed bigint NOT NULL DEFAULT 0,
  at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- The requests that are still to be done.
CREATE INDEX request_open ON {p}request (log, sink, id) WHERE state = 'open';

-- Events that a consumer of this service has handled.
CREATE TABLE {p}inbox (
  consumer text COLLATE "C" NOT NULL,
  source text COLLATE "C" NOT NULL,
  id text COLLATE "C" NOT NULL,
  at timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (consumer, source, id)
);

-- The oldest entries, which are removed.
CREATE INDEX inbox_at ON {p}inbox (at);
