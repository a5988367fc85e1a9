//! Pictures to patch features.
