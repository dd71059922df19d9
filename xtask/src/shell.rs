//! Running other programs.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

/// The workspace's root.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace")
}

/// Where cargo builds.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Runs cargo; its output is shown.
pub(crate) fn cargo(args: &[&str]) -> Result<()> {
    run("cargo", args, &[])
}

/// Runs a program in the workspace's root, with further environment variables; its output is shown.
pub(crate) fn run(program: &str, args: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    println!("$ {program} {}", args.join(" "));
    let mut command = Command::new(program);
    command.args(args).current_dir(root()).envs(environment.iter().copied());
    let status = command.status().with_context(|| format!("{program} does not start"))?;
    ensure!(status.success(), "{program} {}: {status}", args.join(" "));
    Ok(())
}

/// Runs a program and answers what it writes to stdout.
pub(crate) fn output(program: &str, args: &[&str]) -> Result<String> {
    output_with(program, args, &[])
}

/// The same, with further environment variables.
pub(crate) fn output_with(program: &str, args: &[&str], environment: &[(&str, &str)]) -> Result<String> {
    let mut command = Command::new(program);
    let output =
        command.args(args).envs(environment.iter().copied()).current_dir(root()).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("{program} does not start"))?;
    ensure!(output.status.success(), "{program} {}: {}", args.join(" "), output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// Where a program is, if it is installed.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}
