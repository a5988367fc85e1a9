//! Rows of examples as tensors.

use m6_data::picture::Rgb8;
use m6_runtime::attention::{Layout, Span};
use m6_runtime::device::upload;
use m6_vqgan::pictures_to_tensor;
use tch::{Device, Tensor};

use super::{Example, Target, Task};
use crate::error::Result;
use crate::model::{Positions, Sequence, Tokens, Vocab};

/// On a GPU the number of pictures is rounded up to a multiple of this: cuDNN plans every convolution anew for a
/// batch size that it has not met.
const PICTURE_BUCKET: usize = 32;

/// Targets of one head.
#[derive(Debug)]
pub struct Targets {
    /// `[m]` places in the row whose output is scored.
    pub rows: Tensor,
    /// `[m]` the head's row that should win.
    pub labels: Tensor,
    /// `[m]` the task each belongs to, by its place in [`Task::ALL`].
    pub tasks: Tensor,
    /// `m`.
    pub count: usize,
}

/// A packed micro-batch on its device.
#[derive(Debug)]
pub struct Batch {
    /// The row.
    pub tokens: Tokens,
    /// `[b, 3, s, s]` bytes of the pictures seen as patches.
    pub pictures: Option<Tensor>,
    /// Where examples begin and end.
    pub layout: Layout,
    /// Tokens that are not padding.
    pub real: i64,
    /// Text targets.
    pub texts: Targets,
    /// Code targets.
    pub codes: Targets,
}

/// Lays examples one after the other into a row. `fill_to` fills it up to this many tokens, and the pictures up to a
/// bucket, so that shapes on a GPU hardly change from step to step.
///
/// # Errors
/// When pictures differ in size.
pub fn lay_out(
    vocab: Vocab,
    positions: Positions,
    examples: impl IntoIterator<Item = Example>,
    fill_to: Option<usize>,
) -> Result<HostBatch> {
    let mut sequence = Sequence::new(vocab, positions);
    let mut spans = Vec::new();
    let mut pictures = Vec::new();
    let (mut texts, mut codes) = (HostTargets::default(), HostTargets::default());
    for example in examples {
        let start = sequence.len();
        sequence.begin();
        for piece in example.prefix {
            piece.append(&mut sequence, &mut pictures);
        }
        let first = sequence.len();
        example.target.append(&mut sequence, vocab);
        spans.push(Span { prefix: (first - start) as i64, target: (sequence.len() - first) as i64 });
        let labels = example.target.labels(vocab);
        match example.target {
            Target::Text { .. } => texts.push(first, labels, example.task),
            Target::Codes { .. } => codes.push(first, labels, example.task),
        }
    }
    let real = sequence.len();
    if let Some(tokens) = fill_to {
        if real < tokens {
            sequence.begin();
            let padding = tokens - real;
            sequence.padding(padding);
            // In spans no longer than examples: a longer one would keep attention from what is fast for these.
            let longest = spans.iter().map(|span| span.len() as usize).max().filter(|length| *length > 0);
            let starts = (0..padding).step_by(longest.unwrap_or(padding));
            let length = |start: usize| longest.unwrap_or(padding).min(padding - start) as i64;
            spans.extend(starts.map(|start| Span { prefix: 0, target: length(start) }));
        }
        pad_pictures(&mut pictures);
    }
    let pictures = if pictures.is_empty() { None } else { Some(pictures_to_tensor(&pictures)?) };
    Ok(HostBatch { sequence, pictures, spans, real: real as i64, texts, codes })
}

/// A packed micro-batch before it goes to its device; made ahead, on a thread of its own.
#[derive(Debug)]
pub struct HostBatch {
    sequence: Sequence,
    pictures: Option<Tensor>,
    spans: Vec<Span>,
    real: i64,
    texts: HostTargets,
    codes: HostTargets,
}

impl HostBatch {
    /// The batch on `device`; the copies are not waited for.
    ///
    /// # Errors
    /// When the device has no memory.
    pub fn upload(self, device: Device) -> Result<Batch> {
        Ok(Batch {
            tokens: self.sequence.to_device(device)?,
            pictures: self.pictures.map(|pictures| upload(&pictures, device)).transpose()?,
            layout: Layout::new(self.spans, device)?,
            real: self.real,
            texts: self.texts.to_device(device)?,
            codes: self.codes.to_device(device)?,
        })
    }
}

/// Fills up to a multiple of [`PICTURE_BUCKET`] with copies of the last picture, whose features nothing uses.
fn pad_pictures(pictures: &mut Vec<Rgb8>) {
    if let Some(last) = pictures.last().cloned() {
        pictures.resize(pictures.len().next_multiple_of(PICTURE_BUCKET), last);
    }
}

#[derive(Debug, Default)]
struct HostTargets {
    rows: Vec<i64>,
    labels: Vec<i64>,
    tasks: Vec<i64>,
}

impl HostTargets {
    fn push(&mut self, first: usize, labels: Vec<i64>, task: Task) {
        self.rows.extend((first..first + labels.len()).map(|row| row as i64));
        self.tasks.extend(labels.iter().map(|_| task as i64));
        self.labels.extend(labels);
    }

    fn to_device(&self, device: Device) -> Result<Targets> {
        let count = self.rows.len() as i64;
        let all = [self.rows.as_slice(), &self.labels, &self.tasks].concat();
        let all = upload(&Tensor::from_slice(&all), device)?;
        let part = |index: i64| all.narrow(0, index * count, count);
        Ok(Targets { rows: part(0), labels: part(1), tasks: part(2), count: self.rows.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Language, Special};
    use crate::objectives::Piece;

    const VOCAB: Vocab = Vocab { text: 20, codes: 4 };
    const POSITIONS: Positions = Positions { text: 8, patch_grid: 2, code_grid: 2 };

    fn caption() -> Example {
        Example {
            task: Task::Captioning,
            prefix: vec![Piece::Picture(Rgb8::filled(8, 8, [9; 3]))],
            target: Target::Text { language: Language::Zh, ids: vec![5, 6] },
        }
    }

    fn drawing() -> Example {
        Example {
            task: Task::TextToImage,
            prefix: vec![Piece::Text(vec![1])],
            target: Target::Codes {
                seen: vec![3, 3, 1, 0],
                codes: vec![3, 2, 1, 0],
                places: vec![0, 1, 2, 3],
            },
        }
    }

    #[test]
    fn targets_point_at_the_tokens_that_predict_them() {
        let row = lay_out(VOCAB, POSITIONS, [caption(), drawing()], None).unwrap();
        let batch = row.upload(Device::Cpu).unwrap();
        let list = |t: &Tensor| Vec::<i64>::try_from(t).unwrap();
        assert_eq!(batch.real, 4 + 3 + 1 + 5);
        assert_eq!(batch.layout.spans(), [Span { prefix: 4, target: 3 }, Span { prefix: 1, target: 5 }]);
        assert_eq!(list(&batch.texts.rows), [4, 5, 6]);
        assert_eq!(list(&batch.texts.labels), [5, 6, VOCAB.special(Special::EndOfText)]);
        assert_eq!(list(&batch.codes.rows), [8, 9, 10, 11, 12]);
        assert_eq!(list(&batch.codes.labels), [3, 2, 1, 0, VOCAB.end_of_image()]);
        let ids = list(&batch.tokens.ids);
        assert_eq!(ids[4..7], [VOCAB.special(Special::Chinese), 5, 6]);
        assert_eq!(
            ids[8..],
            [
                VOCAB.special(Special::BeginOfImage),
                VOCAB.code(3),
                VOCAB.code(3),
                VOCAB.code(1),
                VOCAB.code(0)
            ]
        );
        assert_eq!(batch.pictures.unwrap().size(), [1, 3, 8, 8]);
    }

    #[test]
    fn padding_fills_the_row_and_belongs_to_nobody() {
        let row = lay_out(VOCAB, POSITIONS, [drawing(), caption()], Some(20)).unwrap();
        let batch = row.upload(Device::Cpu).unwrap();
        assert_eq!((batch.real, batch.tokens.ids.size()), (13, vec![20]));
        assert_eq!(batch.layout.spans()[2..], [Span { prefix: 0, target: 7 }]);
        let row = lay_out(VOCAB, POSITIONS, [drawing(), caption()], Some(29)).unwrap();
        let padding = [7, 7, 2].map(|target| Span { prefix: 0, target });
        assert_eq!(row.spans[2..], padding, "in spans as long as the longest example");
        assert_eq!((batch.texts.count, batch.codes.count), (3, 5));
        assert_eq!(batch.pictures.unwrap().size(), [PICTURE_BUCKET as i64, 3, 8, 8]);
    }
}
