//! Cross-entropy of a packed batch, by head and by task.

use m6_runtime::fused::linear_cross_entropy;
use tch::{Kind, Tensor};

use crate::error::Result;
use crate::model::{Mode, Transformer};
use crate::objectives::{Batch, Targets, Task};

/// Losses of one micro-batch, all on the device.
#[derive(Debug)]
pub struct Losses {
    /// What is minimised: mean over code targets, plus mean over text targets, plus the routers' losses. The two
    /// means are taken apart, or the few text targets would drown among the codes.
    pub total: Tensor,
    /// `[tasks]` sums of the targets' cross-entropies, in nats.
    pub task_sums: Tensor,
    /// `[tasks]` numbers of targets.
    pub task_counts: Tensor,
    /// Share of routed rows that each expert was chosen for, where there are experts.
    pub expert_load: Option<Tensor>,
    /// Share of routed rows that were dropped, where experts can be full.
    pub expert_dropped: Option<Tensor>,
}

/// Runs the stack over a batch and scores its targets.
///
/// # Errors
/// When libtorch refuses an attention call.
pub fn losses(transformer: &Transformer, batch: &Batch, mode: Mode) -> Result<Losses> {
    let hidden =
        transformer.forward(&batch.tokens, batch.pictures.as_ref(), &batch.layout, batch.real, mode)?;
    let device = hidden.x_nd.device();
    let zeros = || Tensor::zeros([Task::ALL.len() as i64], (Kind::Float, device));
    let (mut task_sums, mut task_counts) = (zeros(), zeros());
    let (mut total, expert_load, expert_dropped) = match hidden.routers {
        Some(routers) => (routers.loss, Some(routers.loads), routers.dropped),
        None => (Tensor::zeros([], (Kind::Float, device)), None, None),
    };
    let heads: [(&Targets, Option<Tensor>); 2] =
        [(&batch.texts, Some(transformer.text_head())), (&batch.codes, transformer.code_head())];
    for (targets, head) in heads {
        let Some(head) = head.filter(|_| targets.count > 0) else { continue };
        let rows = hidden.x_nd.index_select(0, &targets.rows);
        let (mean, each) = linear_cross_entropy(&rows, &head, &targets.labels);
        total = mean + total;
        task_sums = task_sums.index_add(0, &targets.tasks, &each);
        task_counts = task_counts.index_add(0, &targets.tasks, &each.ones_like());
    }
    Ok(Losses { total, task_sums, task_counts, expert_load, expert_dropped })
}
