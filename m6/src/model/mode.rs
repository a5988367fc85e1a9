//! What all parts of a forward pass have to know.

/// How a forward pass is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// With dropout.
    Train,
    /// Without.
    Infer,
}
