//! Ways to break the code on purpose, to see that a test notices: `cargo xtask mutants`.

/// The variable that names the mutant of a test run.
#[cfg(outbus_mutants)]
pub const MUTANT_VARIABLE: &str = "OUTBUS_MUTANT";

/// Whether the code is to be broken here. It never is, but in the build that `cargo xtask mutants` makes.
#[cfg(not(outbus_mutants))]
#[inline(always)]
pub const fn mutant(_name: &'static str) -> bool {
    false
}

/// Whether the code is to be broken here: where [`MUTANT_VARIABLE`] says so.
#[cfg(outbus_mutants)]
pub fn mutant(name: &'static str) -> bool {
    static CHOSEN: std::sync::LazyLock<Option<String>> =
        std::sync::LazyLock::new(|| std::env::var(MUTANT_VARIABLE).ok());
    CHOSEN.as_deref() == Some(name)
}
