//! One update of everything that is trained, launched kernel by kernel or, once steps are alike, as a CUDA graph.

use std::rc::Rc;

use m6_runtime::CudaGraph;
use tch::{Device, Tensor};

use super::critic::CriticPlan;
use super::state::State;
use crate::bottleneck::Bottleneck;
use crate::error::Result;
use crate::loss::{ReconstructionLoss, Term};

/// Steps that are alike before one of their kind is recorded: libraries choose their kernels in them.
const WARM_UP: u64 = 3;

/// What a step does. Steps of one plan launch the same kernels, and differ by what is in tensors alone.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Plan {
    pub(super) bottleneck: Bottleneck,
    pub(super) critic: Option<CriticPlan>,
}

/// What is left of an update, on the device.
#[derive(Debug)]
pub(super) struct Updated {
    /// Of the last micro-batch, without gradients.
    pub(super) terms: Vec<Term>,
    /// Encoder outputs of the last micro-batch, `[n, d]`.
    pub(super) rows_nd: Tensor,
    pub(super) grad_norm: Tensor,
}

/// Makes the updates of a run.
#[derive(Debug)]
pub(super) struct Stepper {
    loss: ReconstructionLoss,
    clip: f64,
    device: Device,
    /// The plan of the last step, and how many steps before it had the same.
    last: Option<(Plan, u64)>,
    recorded: Option<Recorded>,
}

#[derive(Debug)]
struct Recorded {
    plan: Plan,
    graph: CudaGraph,
    /// The micro-batches that it reads.
    inputs: Vec<Tensor>,
    updated: Rc<Updated>,
}

impl Stepper {
    pub(super) fn new(loss: ReconstructionLoss, clip: f64, device: Device) -> Self {
        Self { loss, clip, device, last: None, recorded: None }
    }

    /// One update from `micro_batches` of pictures `[b, 3, h, w]`, whose number and shapes are the same in all calls.
    pub(super) fn update(
        &mut self,
        state: &mut State,
        plan: Plan,
        micro_batches: Vec<Tensor>,
    ) -> Result<Rc<Updated>> {
        if let Some(recorded) = self.recorded.as_ref().filter(|recorded| recorded.plan == plan) {
            for (input, x) in recorded.inputs.iter().zip(&micro_batches) {
                input.shallow_clone().copy_(x);
            }
            recorded.graph.replay()?;
            return Ok(recorded.updated.clone());
        }
        let alike = self.last.filter(|(last, _)| *last == plan).map_or(0, |(_, before)| before + 1);
        self.last = Some((plan, alike));
        if !self.device.is_cuda() || alike < WARM_UP {
            return Ok(Rc::new(self.compute(state, plan, &micro_batches)?));
        }
        // Its memory goes to the next.
        self.recorded = None;
        let work = || self.compute(state, plan, &micro_batches);
        let (graph, updated) = CudaGraph::record(self.device, work)?;
        graph.replay()?;
        let updated = Rc::new(updated);
        self.recorded = Some(Recorded { plan, graph, inputs: micro_batches, updated: updated.clone() });
        Ok(updated)
    }

    fn compute(&self, state: &mut State, plan: Plan, micro_batches: &[Tensor]) -> Result<Updated> {
        let State { model, optimizer, codebook, critic, .. } = state;
        let mut critic = critic.as_mut().zip(plan.critic);
        let share = |terms: &[Term]| Term::total(terms) / micro_batches.len() as f64;
        let (mut terms, mut rows_nd) = (Vec::new(), Tensor::new());
        for x in micro_batches {
            let output = model.forward(x, plan.bottleneck);
            let y = &output.reconstruction;
            terms = self.loss.terms(x, y);
            terms.extend(codebook.observe(&output));
            if let Some((critic, plan)) = critic.as_ref().filter(|(_, plan)| plan.ratio > 0.0) {
                terms.extend(critic.model_terms(x, y, plan.ratio, &terms, model.last_kernel()));
            }
            share(&terms).backward();
            if let Some((critic, plan)) = &critic {
                let own = critic.own_terms(x, y, plan.r1);
                share(&own).backward();
                terms.extend(own);
            }
            rows_nd = output.rows_nd.detach();
        }
        let grad_norm = optimizer.step(self.clip)?;
        optimizer.zero_grad()?;
        if let Some((critic, _)) = &mut critic {
            critic.step(self.clip)?;
        }
        codebook.step(&grad_norm);
        let terms = terms.into_iter().map(|term| Term { value: term.value.detach(), ..term }).collect();
        Ok(Updated { terms, rows_nd, grad_norm })
    }
}
