//! Every example runs and prints what it says.

use std::process::Command;

fn run(program: &str) -> String {
    let output = Command::new(program).output().expect("it starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[test]
fn quickstart() {
    assert_eq!(run(env!("CARGO_BIN_EXE_quickstart")), "billed 5\n");
}

#[test]
fn dead_letters() {
    let printed = run(env!("CARGO_BIN_EXE_dead_letters"));
    for line in ["billed 5", "billed 7", "dead after 3 attempts: an order for nothing", "retried 1", "billed 0"] {
        assert!(printed.lines().any(|printed| printed == line), "{line}: {printed}");
    }
    assert_eq!(printed.lines().last(), Some("billed 0"));
}

/// The front page shows the program that is compiled and run here.
#[test]
fn the_front_page_shows_the_quickstart() {
    let readme = include_str!("../../README.md");
    let program = include_str!("../src/bin/quickstart.rs");
    let body = program.split_once("// The order and its event").expect("its body").1;
    let shown: Vec<&str> = body.lines().map(str::trim).filter(|line| !line.is_empty()).take(22).collect();
    for line in shown {
        assert!(readme.contains(line), "the front page lacks: {line}");
    }
}
