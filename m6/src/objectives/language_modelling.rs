//! Language modelling: the prefix is empty (M6, section 3.3).

use super::{Example, Target, Task};
use crate::model::Language;

pub(super) fn example(language: Language, ids: Vec<i64>) -> Example {
    Example { task: Task::LanguageModelling, prefix: Vec::new(), target: Target::Text { language, ids } }
}
