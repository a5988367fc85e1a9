//! The static key/value cache: a prefix in one pass, then one target token a row at a time.
//!
//! Legend: `r` rows, `t` tokens, `d` model width, `h` heads, `k` head width.

use std::collections::{BTreeMap, BTreeSet};

use m6_data::picture::Rgb8;
use m6_vqgan::pictures_to_tensor;
use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::model::{Mode, Sequence, Tokens, Transformer};
use crate::objectives::Piece;

/// Keys and values of every block for `r` rows whose prefixes may differ in length.
///
/// Prefixes are padded on the right to the longest of them; the padding is hidden from every query that counts, and
/// the targets of all rows begin behind it. Rows share a batch without sharing anything else.
#[derive(Debug)]
pub struct KvCache {
    blocks: Vec<BlockCache>,
    /// `[r, 1, 1, t]`, true where a key may be seen; absent where no row is padded.
    visible: Option<Tensor>,
    /// `[r]` tokens of each row's prefix.
    lengths: Tensor,
    /// Tokens of the longest prefix.
    longest: i64,
    filled: i64,
}

/// Keys and values of one block, `[r, g, t, k]` with `g` key heads, written in place.
#[derive(Debug)]
struct BlockCache {
    keys: Tensor,
    values: Tensor,
}

impl KvCache {
    /// Runs the prefix of each row, all of it in sight of all of it, and leaves room for `targets` more tokens a row.
    /// Pictures must have the resolution that the transformer's patches are made for.
    ///
    /// # Errors
    /// When pictures differ in size, or libtorch refuses an operation.
    pub fn prefill(
        transformer: &Transformer,
        device: Device,
        prefixes: &[Vec<Piece>],
        targets: i64,
    ) -> Result<Self> {
        let (sequence, lengths, pictures) = pad(transformer, prefixes);
        let rows = prefixes.len() as i64;
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let config = transformer.config();
        let shape = [rows, config.kv_heads(), longest + targets, config.head_width()];
        let empty = || Tensor::zeros(shape, (transformer.compute(), device));
        let uneven = lengths.iter().any(|&length| length != longest);
        let cache = Self {
            blocks: (0..config.layers).map(|_| BlockCache { keys: empty(), values: empty() }).collect(),
            visible: uneven.then(|| visible(&lengths, longest, targets).to_device(device)),
            lengths: Tensor::from_slice(&lengths).to_device(device),
            longest,
            filled: longest,
        };
        if longest > 0 {
            let pictures = match pictures.as_slice() {
                [] => None,
                some => Some(pictures_to_tensor(some)?.to_device(device)),
            };
            let tokens = sequence.to_device(device)?;
            let x_nd = transformer.embed(&tokens, pictures.as_ref());
            // A row without a prefix has no key to see; its padding, which nobody looks at, sees all padding instead.
            let seen = uneven.then(|| {
                let lengths: Vec<i64> = lengths.iter().map(|&n| if n == 0 { longest } else { n }).collect();
                visible(&lengths, longest, 0).to_device(device)
            });
            let places = tokens.places.view([rows, longest]);
            let _hidden = cache.run(transformer, x_nd, &places, 0, seen.as_ref())?;
        }
        Ok(cache)
    }

    /// Runs one target token a row, `tokens` being of `r` tokens; returns their hidden rows `[r, d]`.
    ///
    /// # Errors
    /// When libtorch refuses an operation.
    pub fn step(&mut self, transformer: &Transformer, tokens: &Tokens) -> Result<Tensor> {
        let at = self.filled;
        self.filled += 1;
        let seen = self.visible.as_ref().map(|visible| visible.narrow(3, 0, self.filled));
        let places = (&self.lengths + (at - self.longest)).unsqueeze(-1);
        self.run(transformer, transformer.embed(tokens, None), &places, at, seen.as_ref())
    }

    /// Makes row `i` a copy of what row `rows[i]` was; the number of rows may change.
    pub fn select(&mut self, rows: &[i64]) {
        let Some(first) = self.blocks.first() else { return };
        let rows = Tensor::from_slice(rows).to_device(first.keys.device());
        for block in &mut self.blocks {
            block.keys = block.keys.index_select(0, &rows);
            block.values = block.values.index_select(0, &rows);
        }
        self.visible = self.visible.take().map(|visible| visible.index_select(0, &rows));
        self.lengths = self.lengths.index_select(0, &rows);
    }

    /// Runs `t` tokens a row, `[r * t, d]`, of these `places` `[r, t]` in their examples, whose keys and values are put
    /// at place `at` of the cache.
    fn run(
        &self,
        transformer: &Transformer,
        x_nd: Tensor,
        places: &Tensor,
        at: i64,
        seen: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (real, t) = (x_nd.size()[0], places.size()[1]);
        let config = transformer.config();
        // As in Qwen, the angles that depend on a length keep those of the prefix: keys in the cache are turned already.
        let lengths = self.lengths.unsqueeze(-1).expand_as(places).flatten(0, 1);
        let rotation = transformer.rotation(&places.flatten(0, 1), &lengths, Mode::Infer);
        let windows: BTreeSet<i64> =
            (0..self.blocks.len()).filter_map(|index| config.window(index)).collect();
        let near = windows.into_iter().map(|size| {
            let near = self.near(places, at + t, size);
            (size, seen.map_or(near.shallow_clone(), |seen| seen.logical_and(&near)))
        });
        let near: BTreeMap<i64, Tensor> = near.collect();
        let hidden = transformer.run(x_nd, rotation.as_ref(), real, Mode::Infer, |index, heads| {
            let (q, k, v) = heads.split();
            let [q, k, v] = [q, k, v].map(|x_nhk| {
                let size = x_nhk.size();
                x_nhk.reshape([-1, t, size[1], size[2]]).transpose(1, 2) // [r, h, t, k]
            });
            let block = &self.blocks[index];
            block.keys.narrow(2, at, t).copy_(&k);
            block.values.narrow(2, at, t).copy_(&v);
            let keys = block.keys.narrow(2, 0, at + t);
            let values = block.values.narrow(2, 0, at + t);
            let seen = config.window(index).map_or(seen, |size| near.get(&size));
            let is_grouped = config.kv_heads() < config.heads;
            let out =
                Tensor::scaled_dot_product_attention(&q, &keys, &values, seen, 0.0, false, None, is_grouped);
            Ok(out.transpose(1, 2).flatten(0, 1)) // [r * t, h, k]
        })?;
        Ok(hidden.x_nd)
    }

    /// `[r, 1, t, keys]`, true where a key of the first `keys` is at most `size - 1` places before the query's place
    /// `[r, t]`.
    fn near(&self, places: &Tensor, keys: i64, size: i64) -> Tensor {
        let slots = Tensor::arange(keys, (Kind::Int64, places.device()));
        // Targets begin behind the longest prefix, but their places behind their own.
        let shift = (self.longest - &self.lengths).unsqueeze(-1) * slots.ge(self.longest);
        let key_places = slots - shift; // [r, keys]
        let distance = places.unsqueeze(-1) - key_places.unsqueeze(1);
        distance.lt(size).unsqueeze(1)
    }
}

/// All prefixes as one sequence of rows of equal length, with the true lengths and the pictures in order.
fn pad(transformer: &Transformer, prefixes: &[Vec<Piece>]) -> (Sequence, Vec<i64>, Vec<Rgb8>) {
    let positions = transformer.positions();
    let length = |piece: &Piece| piece.tokens(positions.patches());
    let lengths: Vec<usize> = prefixes.iter().map(|prefix| prefix.iter().map(length).sum()).collect();
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let mut sequence = Sequence::new(transformer.vocab(), positions);
    let mut pictures = Vec::new();
    for (prefix, length) in prefixes.iter().zip(&lengths) {
        sequence.begin();
        for piece in prefix {
            piece.clone().append(&mut sequence, &mut pictures);
        }
        sequence.padding(longest - length);
    }
    (sequence, lengths.into_iter().map(|n| n as i64).collect(), pictures)
}

/// `[r, 1, 1, longest + targets]`, true for the keys of each row's own prefix and for all targets.
fn visible(lengths: &[i64], longest: i64, targets: i64) -> Tensor {
    let places = Tensor::arange(longest + targets, (Kind::Int64, Device::Cpu));
    let own = places.lt_tensor(&Tensor::from_slice(lengths).unsqueeze(-1));
    own.logical_or(&places.ge(longest)).view([lengths.len() as i64, 1, 1, -1])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::testing::{picture, tiny, tiny_rotary};
    use crate::objectives::{Example, Target, Task, lay_out};

    /// Prefixes of three lengths, one of them with a picture and one empty, and three codes for each.
    fn rows() -> Vec<(Vec<Piece>, [u32; 3])> {
        vec![
            (vec![Piece::Text(vec![1, 2, 3, 4])], [0, 5, 2]),
            (vec![Piece::Text(vec![7])], [1, 1, 1]),
            (vec![Piece::Picture(picture(3)), Piece::Text(vec![9])], [6, 7, 0]),
            (vec![], [3, 4, 5]),
        ]
    }

    /// Hidden rows `[r, 4, d]` of begin-of-image and the codes, from the training pass over one packed row.
    fn packed(transformer: &Transformer, rows: &[(Vec<Piece>, [u32; 3])]) -> Tensor {
        let examples = rows.iter().map(|(prefix, codes)| {
            let (codes, places) = (codes.to_vec(), vec![0, 1, 2]);
            let target = Target::Codes { seen: codes.clone(), codes, places };
            Example { task: Task::TextToImage, prefix: prefix.clone(), target }
        });
        let row = lay_out(transformer.vocab(), transformer.positions(), examples, None).unwrap();
        let batch = row.upload(Device::Cpu).unwrap();
        let (tokens, pictures) = (&batch.tokens, batch.pictures.as_ref());
        let hidden = transformer.forward(tokens, pictures, &batch.layout, batch.real, Mode::Infer).unwrap();
        let x_rtd = hidden.x_nd.index_select(0, &batch.codes.rows);
        x_rtd.view([rows.len() as i64, 4, transformer.config().width])
    }

    fn step(cache: &mut KvCache, transformer: &Transformer, place: usize, codes: &[u32]) -> Tensor {
        let mut sequence = Sequence::new(transformer.vocab(), transformer.positions());
        let (last, place) = (3, place as i64);
        for code in codes {
            match place {
                0 => sequence.begin_of_image(Some(0)),
                _ => sequence.code(*code, place - 1, (place < last).then_some(place)),
            }
        }
        cache.step(transformer, &sequence.to_device(Device::Cpu).unwrap()).unwrap()
    }

    #[test]
    fn steps_equal_the_training_pass_for_uneven_prefixes() {
        let _guard = tch::no_grad_guard();
        for (_params, transformer) in [tiny(), tiny_rotary()] {
            let rows = rows();
            let expected = packed(&transformer, &rows);
            let prefixes: Vec<_> = rows.iter().map(|(prefix, _)| prefix.clone()).collect();
            let mut cache = KvCache::prefill(&transformer, Device::Cpu, &prefixes, 4).unwrap();
            for place in 0..4 {
                let codes: Vec<u32> = rows.iter().map(|(_, codes)| codes[place.max(1) - 1]).collect();
                let hidden = step(&mut cache, &transformer, place, &codes);
                for logits in [Transformer::code_logits, Transformer::text_logits] {
                    let gap = logits(&transformer, &hidden)
                        - logits(&transformer, &expected.select(1, place as i64));
                    let gap = gap.abs().max().double_value(&[]);
                    assert!(gap < 1e-4, "place {place}: {gap}");
                }
            }
        }
    }

    #[test]
    fn selected_rows_go_on_as_they_were() {
        let _guard = tch::no_grad_guard();
        for (_params, transformer) in [tiny(), tiny_rotary()] {
            let rows = rows();
            let expected = packed(&transformer, &rows);
            let prefixes: Vec<_> = rows.iter().map(|(prefix, _)| prefix.clone()).collect();
            let mut cache = KvCache::prefill(&transformer, Device::Cpu, &prefixes, 4).unwrap();
            let firsts: Vec<u32> = rows.iter().map(|(_, codes)| codes[0]).collect();
            let _ = step(&mut cache, &transformer, 0, &firsts);
            let order = [2, 0, 2, 3, 1, 1];
            cache.select(&order);
            let codes = order.map(|row| rows[row as usize].1[0]);
            let hidden = step(&mut cache, &transformer, 1, &codes);
            let expected = expected.select(1, 1).index_select(0, &Tensor::from_slice(&order));
            assert!((hidden - expected).abs().max().double_value(&[]) < 1e-4);
        }
    }

    #[test]
    fn all_prefixes_may_be_empty() {
        let _guard = tch::no_grad_guard();
        let (_params, transformer) = tiny();
        let mut cache = KvCache::prefill(&transformer, Device::Cpu, &[vec![], vec![]], 1).unwrap();
        let hidden = step(&mut cache, &transformer, 0, &[0, 0]);
        assert_eq!(hidden.size(), [2, transformer.config().width]);
        assert!((hidden.get(0) - hidden.get(1)).abs().max().double_value(&[]) < 1e-6);
    }
}
