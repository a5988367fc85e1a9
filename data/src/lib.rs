//! Tar shards to decoded, tokenised, packed examples; no tensor library.
