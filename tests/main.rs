//! End to end: the real `m6` on data made here, each test in a temporary folder of its own.
//!
//! One test binary of package `m6`, because cargo names a program only to the tests of its own package, and builds it
//! before them.

mod bad_input;
mod bad_models;
mod codes;
mod golden;
mod pipeline;
mod readme;
mod refusals;
mod resume;
mod scene;
