//! What was drawn.

use m6_data::picture::Rgb8;

/// A picture and what it was drawn from.
#[derive(Debug, Clone)]
pub struct Drawing {
    /// Its prompt.
    pub prompt: String,
    /// Its own seed.
    pub seed: u64,
    /// Its codes, row-major.
    pub codes: Vec<u32>,
    /// The decoded picture.
    pub picture: Rgb8,
}
