//! How likely a language model finds a text, token by token.

use m6_runtime::attention::{Layout, Span};
use m6_runtime::fused::linear_cross_entropy;
use serde::Serialize;
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::model::{LanguageModel, Mode, RotaryConfig, Sequence};

/// What a model makes of a sequence of tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Likelihood {
    /// The tokens.
    pub tokens: Vec<i64>,
    /// Log-probability, in nats, of each token but the first, given those before it.
    pub logprobs: Vec<f64>,
    /// Mean of their negatives.
    pub nll: f64,
    /// e to that.
    pub perplexity: f64,
}

/// Scores tokens.
///
/// # Errors
/// When there are fewer than two, one is not in the vocabulary, there are more than the model has positions for, or
/// libtorch refuses an operation.
pub fn likelihood(model: &LanguageModel, tokens: &[i64]) -> Result<Likelihood> {
    check(model, tokens)?;
    let _guard = tch::no_grad_guard();
    let transformer = &model.transformer;
    let (device, n) = (model.params.device(), tokens.len() as i64);
    let mut sequence = Sequence::new(transformer.vocab(), transformer.positions());
    sequence.begin();
    sequence.prefix_text(tokens);
    // Nothing is seen whole: every token is a target.
    let layout = Layout::new(vec![Span { prefix: 0, target: n }], device)?;
    let hidden = transformer.forward(&sequence.to_device(device)?, None, &layout, n, Mode::Infer)?.x_nd;
    let labels = Tensor::from_slice(&tokens[1..]).to_device(device);
    let (_, costs) = linear_cross_entropy(&hidden.narrow(0, 0, n - 1), &transformer.text_head(), &labels);
    let costs = costs.to_kind(Kind::Double);
    let nll = costs.mean(Kind::Double).double_value(&[]);
    let logprobs = Vec::<f64>::try_from(-costs).map_err(m6_runtime::RuntimeError::from)?;
    Ok(Likelihood { tokens: tokens.to_vec(), logprobs, nll, perplexity: nll.exp() })
}

fn check(model: &LanguageModel, tokens: &[i64]) -> Result<()> {
    let config = model.config();
    let rows = model.transformer.vocab().text_rows();
    if tokens.len() < 2 {
        let n = tokens.len();
        return Err(Error::Usage(format!(
            "{n} tokens: expected two or more, since the first has none before it"
        )));
    }
    if let Some(token) = tokens.iter().find(|token| !(0..rows).contains(*token)) {
        return Err(Error::Usage(format!("token {token}: expected 0 to {}", rows - 1)));
    }
    let can_be_longer = config.rotary.as_ref().is_some_and(RotaryConfig::is_made_longer);
    if tokens.len() as i64 > config.max_text && !can_be_longer {
        let (n, most) = (tokens.len(), config.max_text);
        return Err(Error::Usage(format!(
            "{n} tokens: expected at most {most}, the positions of this model"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tch::Device;

    use super::*;

    #[test]
    fn a_token_costs_what_the_logits_before_it_say() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/qwen2");
        let model = LanguageModel::load(&folder, Device::Cpu, None).unwrap();
        let golden = m6_runtime::read_tensors(&folder.join("golden.safetensors")).unwrap();
        let golden = |name: &str| &golden.iter().find(|(n, _)| n == name).unwrap().1;
        let tokens = Vec::<i64>::try_from(golden("ids")).unwrap();
        let scored = likelihood(&model, &tokens).unwrap();
        assert!((scored.nll - golden("loss").double_value(&[])).abs() < 1e-5);
        let logits = golden("logits").log_softmax(-1, Kind::Double);
        assert_eq!(scored.logprobs.len(), tokens.len() - 1);
        for (place, logprob) in (0..).zip(&scored.logprobs) {
            let exact = logits.double_value(&[place, tokens[place as usize + 1]]);
            assert!((logprob - exact).abs() < 2e-5);
        }
        // What comes later changes nothing.
        let start = likelihood(&model, &tokens[..9]).unwrap();
        assert!(start.logprobs.iter().zip(&scored.logprobs).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn wrong_tokens_are_named() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/qwen2");
        let model = LanguageModel::load(&folder, Device::Cpu, None).unwrap();
        let message = |tokens: &[i64]| likelihood(&model, tokens).unwrap_err().to_string();
        assert!(message(&[1]).starts_with("1 tokens: expected two or more"));
        assert_eq!(message(&[1, 32]), "token 32: expected 0 to 31");
        assert_eq!(message(&[0; 65]), "65 tokens: expected at most 64, the positions of this model");
    }

    /// The published model with other rotary settings in the place of `"logn": null`.
    fn with_rotary(changed: &str) -> LanguageModel {
        const FOUND: &str = "\"logn\": null";
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/qwen2");
        let dir = tempfile::tempdir().unwrap();
        let published = LanguageModel::load(&folder, Device::Cpu, None).unwrap();
        published.save(dir.path(), published.stored).unwrap();
        let config = dir.path().join("config.json");
        let text = std::fs::read_to_string(&config).unwrap();
        assert!(text.contains(FOUND));
        std::fs::write(&config, text.replace(FOUND, changed)).unwrap();
        LanguageModel::load(dir.path(), Device::Cpu, None).unwrap()
    }

    #[test]
    fn longer_texts_pass_where_queries_grow_with_their_place() {
        let model = with_rotary("\"logn\": 64");
        assert_eq!(likelihood(&model, &[0; 65]).unwrap().logprobs.len(), 64);
    }

    /// Dual chunk attention.
    #[test]
    fn texts_of_a_chunk_are_read_as_ever_and_longer_ones_from_their_second_chunk_on_otherwise() {
        const CHUNK: usize = 12;
        let plain = with_rotary("\"logn\": null");
        let chunked = with_rotary("\"logn\": null, \"chunks\": {\"size\": 12, \"trained\": 16}");
        let tokens: Vec<i64> = (0..80).map(|i| (i * 7 + i / 5) % 32).collect();
        let both =
            |length: usize| [&plain, &chunked].map(|model| likelihood(model, &tokens[..length]).unwrap());
        let [exact, found] = both(CHUNK);
        assert_eq!(exact, found);
        let [exact, found] = both(64);
        let gaps: Vec<f64> =
            exact.logprobs.iter().zip(&found.logprobs).map(|(exact, found)| (exact - found).abs()).collect();
        assert!(gaps[..CHUNK].iter().all(|gap| *gap < 1e-5), "{gaps:?}");
        assert!(gaps[2 * CHUNK..].iter().any(|gap| *gap > 1e-3), "{gaps:?}");
        assert!(likelihood(&plain, &tokens).is_err());
        assert_eq!(likelihood(&chunked, &tokens).unwrap().logprobs.len(), tokens.len() - 1);
    }
}
