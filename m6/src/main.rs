//! The m6 command.
fn main() {}
