//! The examples are the programs in `src/bin`. This library only makes the project's front page a test: its Rust
//! blocks are compiled and run.
#![doc = include_str!("../../README.md")]
