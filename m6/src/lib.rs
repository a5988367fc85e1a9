//! One multimodal transformer: pretrain it on pictures and texts, let it caption pictures and draw them.

pub mod codes;
pub mod demo;
pub mod error;
pub mod eval;
pub mod generate;
pub mod model;
pub mod objectives;
pub mod plan;
pub mod train;

mod table;

pub use error::{Error, Result};
