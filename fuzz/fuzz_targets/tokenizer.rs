//! Any bytes as a tokenizer file of each kind: what can be loaded can encode and decode.
#![no_main]

use std::fs;

use libfuzzer_sys::fuzz_target;
use m6_data::Tokenizer;

const FILES: [&str; 3] = ["tokenizer.json", "vocab.txt", "qwen.tiktoken"];

fuzz_target!(|input: (u8, &[u8], &str)| {
    let (kind, bytes, text) = input;
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join(FILES[usize::from(kind) % FILES.len()]);
    fs::write(&path, bytes).expect("a temporary file");
    if let Ok(tokenizer) = Tokenizer::load(&path)
        && let Ok(ids) = tokenizer.encode(text)
    {
        let _ = tokenizer.decode(&ids);
    }
});
