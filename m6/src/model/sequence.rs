//! The host side of a token sequence: ids, positions and segments, in training and in generation alike.

use m6_runtime::device::upload;
use tch::{Device, Tensor};

use super::vocab::{Special, Vocab};
use crate::error::Result;

/// What kind of content a token belongs to (M6's segment embedding).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Segment {
    PrefixText,
    Patches,
    TargetText,
    Codes,
}

/// Number of segment embeddings.
pub const SEGMENTS: i64 = 4;

/// The row of the table of aims that stands for a token from which no code is predicted.
const NO_AIM: i64 = 0;

/// The rows of the position table. Text has one axis, pictures have two; a token sums two rows, and text takes
/// the row `none` for its second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Positions {
    /// Longest text.
    pub text: i64,
    /// Patches a side.
    pub patch_grid: i64,
    /// Codes a side.
    pub code_grid: i64,
}

impl Positions {
    /// Rows of the table.
    pub fn rows(&self) -> i64 {
        self.code_row(0) + 2 * self.code_grid
    }

    /// Rows of the table of aims: none, then the rows and the columns of the code grid.
    pub fn aim_rows(&self) -> i64 {
        1 + 2 * self.code_grid
    }

    /// Patches of a picture.
    pub fn patches(&self) -> usize {
        (self.patch_grid * self.patch_grid) as usize
    }

    fn none(&self) -> i64 {
        self.text
    }

    fn patch_row(&self, row: i64) -> i64 {
        self.text + 1 + row
    }

    fn code_row(&self, row: i64) -> i64 {
        self.patch_row(0) + 2 * self.patch_grid + row
    }
}

/// A growing sequence. The order of the calls is the order of the tokens.
#[derive(Debug, Clone)]
pub struct Sequence {
    vocab: Vocab,
    positions: Positions,
    ids: Vec<i64>,
    first_position: Vec<i64>,
    second_position: Vec<i64>,
    first_aim: Vec<i64>,
    second_aim: Vec<i64>,
    segments: Vec<i64>,
    /// Where the examples begin.
    starts: Vec<usize>,
    patch_rows: Vec<i64>,
}

impl Sequence {
    /// An empty sequence of a model's vocabulary and position table.
    pub fn new(vocab: Vocab, positions: Positions) -> Self {
        let empty = Vec::new;
        Self {
            vocab,
            positions,
            ids: empty(),
            first_position: empty(),
            second_position: empty(),
            first_aim: empty(),
            second_aim: empty(),
            segments: empty(),
            starts: Vec::new(),
            patch_rows: empty(),
        }
    }

    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there is no token yet.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Begins an example: rotary places are counted from here.
    pub fn begin(&mut self) {
        self.starts.push(self.ids.len());
    }

    /// A text that is seen whole: a prompt, or a text to restore.
    pub fn prefix_text(&mut self, ids: &[i64]) {
        for (position, &id) in ids.iter().enumerate() {
            self.text_token(id, position as i64, Segment::PrefixText);
        }
    }

    /// The patches of one picture, all seen.
    pub fn patches(&mut self) {
        let grid = self.positions.patch_grid;
        for patch in 0..grid * grid {
            self.patch_rows.push(self.ids.len() as i64);
            let row = self.positions.patch_row(patch / grid);
            let column = self.positions.patch_row(grid + patch % grid);
            // The id is not looked at: the patch's feature takes the place of its embedding.
            self.token(0, [row, column], [NO_AIM; 2], Segment::Patches);
        }
    }

    /// Tokens of a target text, the first of which has this place in it.
    pub fn target_text(&mut self, ids: &[i64], first: i64) {
        for (offset, &id) in ids.iter().enumerate() {
            self.text_token(id, first + offset as i64, Segment::TargetText);
        }
    }

    /// The token that begins a picture's codes. Its aim is the place of the first of them, as for
    /// [`Sequence::code`].
    pub fn begin_of_image(&mut self, aim: Option<i64>) {
        let id = self.vocab.special(Special::BeginOfImage);
        self.token(id, [0, self.positions.none()], self.aim(aim), Segment::Codes);
    }

    /// A code of a picture and its place, counted along the rows. Its aim is the place of the code that is predicted
    /// from it, nothing after the last one; so codes can be laid in any order (Yu et al. 2024, RAR, section 3.2).
    pub fn code(&mut self, code: u32, place: i64, aim: Option<i64>) {
        let grid = self.positions.code_grid;
        let row = self.positions.code_row(place / grid);
        let column = self.positions.code_row(grid + place % grid);
        self.token(self.vocab.code(code), [row, column], self.aim(aim), Segment::Codes);
    }

    fn aim(&self, place: Option<i64>) -> [i64; 2] {
        let grid = self.positions.code_grid;
        place.map_or([NO_AIM; 2], |place| [NO_AIM + 1 + place / grid, NO_AIM + 1 + grid + place % grid])
    }

    /// Tokens that belong to nothing, to fill a row.
    pub fn padding(&mut self, count: usize) {
        for _ in 0..count {
            self.text_token(self.vocab.special(Special::Null), 0, Segment::PrefixText);
        }
    }

    fn text_token(&mut self, id: i64, position: i64, segment: Segment) {
        self.token(id, [position, self.positions.none()], [NO_AIM; 2], segment);
    }

    fn token(&mut self, id: i64, positions: [i64; 2], aims: [i64; 2], segment: Segment) {
        self.ids.push(id);
        self.first_position.push(positions[0]);
        self.second_position.push(positions[1]);
        self.first_aim.push(aims[0]);
        self.second_aim.push(aims[1]);
        self.segments.push(segment as i64);
    }

    /// The sequence on a device, in one copy that is not waited for.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn to_device(&self, device: Device) -> Result<Tokens> {
        let n = self.ids.len() as i64;
        let (places, lengths) = self.places();
        let parts = [
            &self.ids,
            &self.first_position,
            &self.second_position,
            &self.first_aim,
            &self.second_aim,
            &self.segments,
            &places,
            &lengths,
            &self.patch_rows,
        ];
        let all = upload(&Tensor::from_slice(&parts.map(Vec::as_slice).concat()), device)?;
        let part = |index: i64| all.narrow(0, index * n, n);
        Ok(Tokens {
            ids: part(0),
            first_position: part(1),
            second_position: part(2),
            first_aim: part(3),
            second_aim: part(4),
            segments: part(5),
            places: part(6),
            lengths: part(7),
            patch_rows: all.narrow(0, 8 * n, self.patch_rows.len() as i64),
        })
    }

    /// The place of each token in its example, and the length of that.
    fn places(&self) -> (Vec<i64>, Vec<i64>) {
        let (mut places, mut lengths) = (Vec::with_capacity(self.len()), Vec::with_capacity(self.len()));
        // Tokens before the first beginning, if any, are an example too.
        let bounds = [&[0], self.starts.as_slice(), &[self.len()]].concat();
        for bounds in bounds.windows(2) {
            let length = bounds[1] - bounds[0];
            places.extend(0..length as i64);
            lengths.extend(std::iter::repeat_n(length as i64, length));
        }
        (places, lengths)
    }
}

/// A sequence of `n` tokens as index tensors.
#[derive(Debug)]
pub struct Tokens {
    /// `[n]` rows of the input table.
    pub ids: Tensor,
    /// `[n]` rows of the position table.
    pub first_position: Tensor,
    /// `[n]` rows of the position table.
    pub second_position: Tensor,
    /// `[n]` rows of the table of aims.
    pub first_aim: Tensor,
    /// `[n]` rows of the table of aims.
    pub second_aim: Tensor,
    /// `[n]` rows of the segment table.
    pub segments: Tensor,
    /// `[n]` place in its example.
    pub places: Tensor,
    /// `[n]` tokens of its example.
    pub lengths: Tensor,
    /// Places in the sequence that take patch features, in the order of the pictures.
    pub patch_rows: Tensor,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_lands_in_its_tables() {
        let vocab = Vocab { text: 10, codes: 4 };
        let positions = Positions { text: 5, patch_grid: 2, code_grid: 3 };
        let mut sequence = Sequence::new(vocab, positions);
        sequence.prefix_text(&[1, 2]);
        sequence.patches();
        sequence.begin_of_image(Some(0));
        for place in 0..9 {
            sequence.code(place as u32 % 4, place, (place < 8).then_some(place + 1));
        }
        sequence.target_text(&[4], 4);
        assert_eq!(sequence.len(), 2 + 4 + 1 + 9 + 1);
        assert_eq!(sequence.patch_rows, [2, 3, 4, 5]);
        let rows = positions.rows();
        let used = sequence.first_position.iter().chain(&sequence.second_position);
        assert!(used.clone().all(|&p| (0..rows).contains(&p)));
        assert_eq!(used.max(), Some(&(rows - 1)), "the last code sits in the last column's row of the table");
        assert!(sequence.ids.iter().all(|&id| (0..vocab.rows()).contains(&id)));
        let aims: Vec<_> = sequence.first_aim.iter().zip(&sequence.second_aim).collect();
        assert!(aims[..6].iter().all(|&aim| aim == (&0, &0)), "texts and patches aim at no code");
        assert_eq!(aims[6..9], [(&1, &4), (&1, &5), (&1, &6)], "the first row, column by column");
        assert_eq!(aims[14..], [(&3, &6), (&0, &0), (&0, &0)], "the last code aims at nothing");
        assert_eq!(positions.aim_rows(), 7);
    }

    #[test]
    fn places_are_counted_from_the_beginning_of_each_example() {
        let positions = Positions { text: 5, patch_grid: 0, code_grid: 0 };
        let mut sequence = Sequence::new(Vocab::language(10), positions);
        for length in [2, 0, 3] {
            sequence.begin();
            sequence.target_text(&vec![1; length], 0);
        }
        assert_eq!(sequence.places(), (vec![0, 1, 0, 1, 2], vec![2, 2, 3, 3, 3]));
    }
}
