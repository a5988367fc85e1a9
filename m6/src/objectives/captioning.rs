//! Image captioning: the prefix is the picture alone (M6, section 3.3).

use m6_data::picture::Rgb8;

use super::{Example, Piece, Target, Task};
use crate::model::Language;

pub(super) fn example(picture: Rgb8, language: Language, ids: Vec<i64>) -> Example {
    let prefix = vec![Piece::Picture(picture)];
    Example { task: Task::Captioning, prefix, target: Target::Text { language, ids } }
}
