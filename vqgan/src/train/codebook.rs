//! The codebook in training: where it starts, what it learns by beside the gradient, and which codes start anew.

use m6_runtime::Params;
use m6_runtime::optim::Ema;
use tch::{Device, Kind, Tensor};

use super::config::TrainConfig;
use crate::bottleneck::{Bottleneck, divergence_from_uniform, entropy_loss};
use crate::codebook::{CodebookConfig, EncoderGradient};
use crate::config::QuantizerKind;
use crate::loss::{LossWeights, Term};
use crate::means::RunningMeans;
use crate::metrics::perplexity;
use crate::model::{Vqgan, VqganOutput};
use crate::revive::{Revival, initialise};

/// Name of the codebook in the state dict, where its codes are free.
const CODEBOOK: &str = "quantize.embedding.weight";

/// What training does to the codebook of a model beside its gradient.
#[derive(Debug)]
pub(super) struct Codebook {
    config: CodebookConfig,
    loss: LossWeights,
    quantizer: QuantizerKind,
    /// Step at which it is made from encoder outputs, if it is.
    start: Option<u64>,
    /// First step with codes.
    codes_from: u64,
    /// First step after which dead codes are left alone.
    revive_until: u64,
    /// Of the run.
    steps: u64,
    /// Usage and running means, for checkpoints.
    pub(super) params: Params,
    revival: Revival,
    means: Option<RunningMeans>,
    /// Where codes are free: the codebook and its average, which are overwritten together.
    tables: Vec<Tensor>,
}

impl Codebook {
    /// Of `model`, whose averaged weights are in `ema`.
    pub(super) fn new(config: &TrainConfig, model: &Vqgan, ema: &Ema, device: Device) -> Self {
        let params = Params::new(device, config.seed);
        let quantizer = config.model.quantizer;
        let revival = Revival::new(&params, &config.model, config.codebook);
        let table = model.codebook();
        let means = config.codebook.ema.map(|decay| {
            // It stays among the weights, so that its average keeps step with that of the encoder.
            let table = table.set_requires_grad(false);
            RunningMeans::new(&(&params / "means"), decay, quantizer, &table)
        });
        let average = ema.state().into_iter().find(|(name, _)| name == CODEBOOK).map(|(_, tensor)| tensor);
        let is_free = quantizer.has_free_codes();
        Self {
            config: config.codebook,
            loss: config.loss,
            quantizer,
            start: (is_free && config.init.is_none()).then_some(config.codebook.warmup),
            codes_from: config.codes_from(),
            revive_until: config.revive_until(),
            steps: config.schedule.steps,
            params,
            revival,
            means,
            tables: std::iter::once(table).chain(average).filter(|_| is_free).collect(),
        }
    }

    /// What lies between encoder and decoder at `step`.
    pub(super) fn bottleneck(&self, step: u64) -> Bottleneck {
        if step < self.codes_from {
            return Bottleneck::Continuous;
        }
        let progress = (step - self.codes_from) as f64 / (self.steps - self.codes_from) as f64;
        Bottleneck::Codes(self.config.gradient.passage(progress))
    }

    /// Whether [`Codebook::start`] comes before the loss of `step`.
    pub(super) fn starts_at(&self, step: u64) -> bool {
        self.start == Some(step)
    }

    /// Makes the codebook from encoder outputs.
    pub(super) fn start(&mut self, rows_nd: &Tensor) {
        initialise(self.quantizer, self.config.start, rows_nd, &mut self.tables);
        if let Some(means) = &mut self.means {
            means.start(&self.tables[0]);
        }
    }

    /// Takes the codes of a micro-batch into account, where it has any, and returns their terms of the loss.
    pub(super) fn observe(&mut self, output: &VqganOutput) -> Vec<Term> {
        let Some(quantized) = &output.quantized else { return Vec::new() };
        let rows_nd = &output.rows_nd;
        self.revival.observe(&quantized.codes_n);
        if let Some(means) = &mut self.means {
            means.observe(rows_nd, &quantized.codes_n);
        }
        if let EncoderGradient::Gumbel(gumbel) = self.config.gradient {
            let value = divergence_from_uniform(&quantized.compared.affinity(rows_nd));
            return vec![Term { name: "kl", weight: gumbel.kl, value }];
        }
        let mut terms = Vec::new();
        if self.means.is_none() {
            let value = quantized.codebook_loss(rows_nd);
            terms.push(Term { name: "codebook", weight: self.loss.codebook, value });
        }
        let value = quantized.commitment_loss(rows_nd);
        terms.push(Term { name: "commitment", weight: self.loss.commitment, value });
        if let Some(entropy) = self.loss.entropy {
            let value = entropy_loss(&quantized.compared.affinity(rows_nd), entropy.temperature);
            terms.push(Term { name: "entropy", weight: entropy.weight, value });
        }
        terms
    }

    /// What an update does to the codes beside their gradient: nothing where `grad_norm`, that of the update, is not
    /// finite, since the other weights stay as they are too.
    pub(super) fn step(&mut self, grad_norm: &Tensor) {
        if let Some(means) = &mut self.means {
            means.step(&mut self.tables[0], &grad_norm.isfinite());
        }
    }

    /// Lets dead codes start anew from encoder outputs `rows_nd` after the update of `step`.
    pub(super) fn revive(&mut self, step: u64, rows_nd: &Tensor) {
        if !(self.codes_from..self.revive_until).contains(&step) {
            return;
        }
        let revived_k = self.revival.revive(rows_nd, &mut self.tables);
        if let Some(means) = &mut self.means {
            means.restart(&revived_k, &self.tables[0]);
        }
    }

    /// How the codes are used, by the names in the metrics.
    pub(super) fn usage(&self) -> [(&'static str, Tensor); 2] {
        let alive = self.revival.dead().logical_not().to_kind(Kind::Float).mean(Kind::Float);
        [("codebook/alive", alive), ("codebook/perplexity", perplexity(self.revival.usage()))]
    }
}

#[cfg(test)]
mod tests {
    use super::super::state::State;
    use super::super::tests::{alone, write_config};
    use super::*;

    fn state(overrides: &[&str]) -> State {
        let dir = tempfile::tempdir().unwrap();
        let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
        let config: TrainConfig = m6_run::config::load(write_config(dir.path()), &overrides).unwrap().config;
        State::new(&config, Device::Cpu).unwrap()
    }

    #[test]
    fn running_means_take_the_place_of_the_gradient_and_start_anew_with_their_codes() {
        let _alone = alone();
        let mut state =
            state(&["codebook.ema=0.5", "loss.codebook=0", "codebook.warmup=0", "codebook.threshold=0.9"]);
        let x = Tensor::rand([2, 3, 16, 16], (Kind::Float, Device::Cpu)) * 2.0 - 1.0;
        let output = state.model.forward(&x, Bottleneck::Continuous);
        state.codebook.start(&output.rows_nd.detach());
        let started = state.model.codebook().copy();
        let output = state.model.forward(&x, state.codebook.bottleneck(0));
        let terms = state.codebook.observe(&output);
        assert_eq!(terms.iter().map(|term| term.name).collect::<Vec<_>>(), ["commitment"]);
        (output.reconstruction.square().mean(Kind::Float) + Term::total(&terms)).backward();
        assert!(!state.model.codebook().grad().defined());
        state.codebook.step(&Tensor::from(1.0));
        assert_ne!(state.model.codebook(), started);

        let dead = state.codebook.revival.dead();
        assert!(dead.any().int64_value(&[]) == 1 && dead.all().int64_value(&[]) == 0);
        state.codebook.revive(0, &output.rows_nd.detach());
        let of = |name: &str| {
            let entries = state.codebook.params.entries();
            entries.into_iter().find(|(found, _)| found == name).unwrap().1.tensor
        };
        let dead = dead.nonzero().flatten(0, -1);
        let revived = |tensor: &Tensor| tensor.index_select(0, &dead);
        assert_eq!(revived(&of("means.counts")), revived(&of("means.counts")).ones_like());
        let gap = revived(&of("means.sums")) - revived(&state.model.codebook());
        assert!(gap.abs().max().double_value(&[]) < 1e-6);
    }

    #[test]
    fn codes_that_are_not_free_neither_start_from_data_nor_anew() {
        let _alone = alone();
        let mut state = state(&["model.quantizer=simvq", "codebook.until=0"]);
        let frozen = state.model.codebook().copy();
        assert!((0..7).all(|step| !state.codebook.starts_at(step)));
        let x = Tensor::rand([2, 3, 16, 16], (Kind::Float, Device::Cpu));
        let output = state.model.forward(&x, state.codebook.bottleneck(2));
        state.codebook.observe(&output);
        state.codebook.step(&Tensor::from(1.0));
        state.codebook.revive(2, &output.rows_nd.detach());
        assert_eq!(state.model.codebook(), frozen);
    }
}
