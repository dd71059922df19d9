//! `outbus migrate`

use serde::Serialize;

use crate::{
    cli::{Format, MigrateArgs},
    config::Config,
    failure::Failure,
    output,
};

#[derive(Serialize)]
struct Printed {
    sql: String,
}

#[derive(Serialize)]
struct Migrated {
    /// The steps that were taken now.
    applied: Vec<&'static str>,
}

pub(super) async fn run(config: &Config, args: &MigrateArgs, format: Format) -> Result<(), Failure> {
    let database = config.database(args.database.database.as_deref())?;
    if args.print {
        let printed = Printed { sql: database.print_migrations() };
        return Ok(output::result(format, &printed, |printed| printed.sql.trim_end().to_owned())?);
    }
    let migrated = Migrated { applied: database.migrate().await? };
    output::result(format, &migrated, |migrated| match migrated.applied.as_slice() {
        [] => "the tables are up to date".to_owned(),
        steps => format!("the tables are ready (applied: {})", steps.join(", ")),
    })?;
    Ok(())
}
