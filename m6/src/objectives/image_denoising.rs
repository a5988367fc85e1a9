//! Image-based text denoising: the picture and its caption with one span masked (M6, section 3.3).

use m6_data::picture::Rgb8;
use rand::Rng;

use super::text_denoising::mask_span;
use super::{Example, Piece, Target, Task};
use crate::model::{Language, Vocab};

pub(super) fn example(
    vocab: Vocab,
    picture: Rgb8,
    language: Language,
    ids: Vec<i64>,
    rng: &mut impl Rng,
) -> Example {
    let prefix = vec![Piece::Picture(picture), Piece::Text(mask_span(vocab, &ids, rng))];
    Example { task: Task::ImageDenoising, prefix, target: Target::Text { language, ids } }
}
