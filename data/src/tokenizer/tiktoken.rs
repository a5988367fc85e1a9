//! Qwen's `*.tiktoken`: a byte-level BPE as ranks of byte strings, `BASE64 RANK` a line.
//!
//! tiktoken merges the two neighbours whose concatenation has the lowest rank. The same is said by a list of merges when
//! each token is split into the two parts that merging with lower ranks alone arrives at, which is how the published
//! `tokenizer.json` of Qwen2 was made as well.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::{byte_level_bpe, special_token};

/// Qwen's special tokens follow the ranks: these, then `<|extra_0|>` to `<|extra_204|>` (tokenization_qwen.py).
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const EXTRA_TOKENS: usize = 205;

/// The `tokenizer.json` of these ranks.
pub(super) fn to_json(text: &str) -> Result<Value, String> {
    let ranks = parse_ranks(text)?;
    let characters = byte_characters();
    let printable = |bytes: &[u8]| bytes.iter().map(|&b| characters[usize::from(b)]).collect::<String>();

    let mut by_rank: Vec<(&[u8], u32)> =
        ranks.iter().map(|(token, &rank)| (token.as_slice(), rank)).collect();
    by_rank.sort_unstable_by_key(|(_, rank)| *rank);
    let mut vocab = Map::new();
    let mut merges = Vec::new();
    for &(token, rank) in &by_rank {
        vocab.insert(printable(token), rank.into());
        // More than two parts: no merge leads to this token, it is found as a whole piece only.
        if let [left, right] = merge_below(&ranks, token, rank)[..] {
            merges.push(json!([printable(left), printable(right)]));
        }
    }
    let first_special = by_rank.last().map_or(0, |(_, rank)| *rank as usize + 1);
    let extra = (0..EXTRA_TOKENS).map(|n| format!("<|extra_{n}|>"));
    let names = SPECIAL.iter().map(|name| (*name).to_owned()).chain(extra);
    let mut added = Vec::new();
    for (id, name) in (first_special..).zip(names) {
        added.push(special_token(id, &name));
        // The engine numbers added tokens itself unless the model knows them; the split pattern cuts these names apart,
        // so that no text is taken for one.
        vocab.insert(name, id.into());
    }
    Ok(byte_level_bpe(vocab.into(), merges.into(), added.into()))
}

fn parse_ranks(text: &str) -> Result<HashMap<Vec<u8>, u32>, String> {
    let mut ranks = HashMap::new();
    let mut used = HashMap::new();
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.is_empty()) {
        let parsed = line.split_once(' ').and_then(|(token, rank)| {
            Some((decode_base64(token).filter(|t| !t.is_empty())?, rank.trim().parse::<u32>().ok()?))
        });
        let (token, rank) = parsed
            .ok_or_else(|| format!("line {number} is \"{line}\", expected a base64 token and its rank"))?;
        if let Some(first) = used.insert(rank, number) {
            return Err(format!("lines {first} and {number} both have rank {rank}"));
        }
        if ranks.insert(token, rank).is_some() {
            return Err(format!("line {number} repeats an earlier token"));
        }
    }
    match (0..=u8::MAX).find(|&byte| !ranks.contains_key([byte].as_slice())) {
        Some(byte) => Err(format!("no token for byte {byte}, expected all 256")),
        None => Ok(ranks),
    }
}

/// Splits `token` into single bytes and merges neighbours, lowest rank first, as long as the rank is below `limit`.
fn merge_below<'a>(ranks: &HashMap<Vec<u8>, u32>, token: &'a [u8], limit: u32) -> Vec<&'a [u8]> {
    // Where each part starts, and behind them the end.
    let mut bounds: Vec<usize> = (0..=token.len()).collect();
    loop {
        let merged = |i: usize| ranks.get(&token[bounds[i]..bounds[i + 2]]).copied();
        let pairs = 0..bounds.len().saturating_sub(2);
        let best = pairs.filter_map(|i| Some((merged(i)?, i))).filter(|(rank, _)| *rank < limit).min();
        match best {
            Some((_, i)) => bounds.remove(i + 1),
            None => return bounds.windows(2).map(|w| &token[w[0]..w[1]]).collect(),
        };
    }
}

/// The printable character that stands for each byte in a `tokenizer.json` (GPT-2's `bytes_to_unicode`).
fn byte_characters() -> [char; 256] {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut stand_ins = '\u{100}'..;
    std::array::from_fn(|b| {
        let byte = b as u8;
        if printable(byte) {
            char::from(byte)
        } else {
            stand_ins.next().unwrap_or(char::REPLACEMENT_CHARACTER)
        }
    })
}

/// Standard base64 with padding (RFC 4648 section 4).
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let (quads, []) = text.as_bytes().as_chunks::<4>() else { return None };
    let mut bytes = Vec::with_capacity(quads.len() * 3);
    for (i, quad) in quads.iter().enumerate() {
        let padding = quad.iter().rev().take_while(|&&c| c == b'=').count();
        if padding > 2 || (padding > 0 && i + 1 < quads.len()) {
            return None;
        }
        let mut bits = 0;
        for &character in &quad[..4 - padding] {
            bits = bits << 6 | base64_value(character)?;
        }
        let [_, group @ ..] = (bits << (6 * padding)).to_be_bytes();
        bytes.extend_from_slice(&group[..3 - padding]);
    }
    Some(bytes)
}

fn base64_value(character: u8) -> Option<u32> {
    let value = match character {
        b'A'..=b'Z' => character - b'A',
        b'a'..=b'z' => character - b'a' + 26,
        b'0'..=b'9' => character - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    };
    Some(value.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::Tokenizer;
    use proptest::prelude::*;

    /// Ranks of the 256 bytes, of every Qwen token that lies within the test texts below, so that these are encoded exactly
    /// as with all 151,643 ranks, and the last.
    const RANKS: &str = include_str!("testdata/qwen_cut.tiktoken");

    fn tokenizer() -> Tokenizer {
        Tokenizer::from_json(to_json(RANKS).unwrap()).unwrap()
    }

    #[test]
    fn qwens_own_test_vectors() {
        let tokenizer = tokenizer();
        let encode = |text| tokenizer.encode(text).unwrap();
        assert_eq!(encode("Hello world"), [9707, 1879]);
        assert_eq!(encode(" Hello world"), [21927, 1879]);
        assert_eq!(encode("print(\"<|endoftext|>\")"), [1350, 9639, 91, 8691, 723, 427, 91, 82598]);
        assert_eq!(encode(" 根"), [51461, 117]);
        assert_eq!(tokenizer.decode(&[51461, 117]).unwrap(), " 根");
        assert_eq!(tokenizer.decode(&[51461]).unwrap(), " \u{fffd}");
        let special = tokenizer.with_special_names();
        assert_eq!(special.encode("print(\"<|endoftext|>\")").unwrap(), [1350, 445, 151_643, 899]);
    }

    #[test]
    fn special_tokens_follow_the_ranks() {
        let tokenizer = tokenizer();
        assert_eq!(tokenizer.token_id("<|endoftext|>"), Some(151_643));
        assert_eq!(tokenizer.token_id("<|im_end|>"), Some(151_645));
        assert_eq!(tokenizer.token_id("<|extra_204|>"), Some(151_850));
        assert_eq!(tokenizer.decode(&[9707, 151_643]).unwrap(), "Hello");
    }

    #[test]
    fn base64() {
        for (text, bytes) in [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9vYg==", "foob")]
        {
            assert_eq!(decode_base64(text).as_deref(), Some(bytes.as_bytes()));
        }
        for text in ["Z", "Zg", "Zg=", "Z===", "====", "Zg==Zg==", "Zm9*"] {
            assert_eq!(decode_base64(text), None, "{text}");
        }
    }

    #[test]
    fn malformed_files_are_refused() {
        let error = |text: &str| to_json(text).unwrap_err();
        assert!(error("IQ== 0\nnonsense\n").contains("line 2 is \"nonsense\""));
        assert!(error("IQ== 0\nIg== 0\n").contains("lines 1 and 2 both have rank 0"));
        assert!(error("IQ== 0\nIQ== 1\n").contains("line 2 repeats"));
        assert!(error("IQ== 0\n").contains("no token for byte 0"));
    }

    proptest! {
        #[test]
        fn any_file_is_survived(text in "[A-Z= 0-9\n]{0,60}") {
            // Too short to hold a token for each byte.
            prop_assert!(to_json(&text).is_err());
        }
    }
}
