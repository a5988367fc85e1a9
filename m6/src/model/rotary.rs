//! Rotary positions (Su et al. 2021): queries and keys are turned by angles that grow with the place of their token.
//!
//! Legend: `n` tokens, `h` heads, `k` head width.

use m6_runtime::chunked_attention::ChunkedQueries;
use m6_runtime::fused::{rotate, split_rotate};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

/// Settings of rotary positions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RotaryConfig {
    /// The slowest angle turns about `base` times slower than the fastest.
    pub base: f64,
    /// How angles change for texts beyond the trained length.
    #[serde(default)]
    pub scaling: Option<RotaryScaling>,
    /// Trained length beyond which queries grow with the logarithm of their place (Qwen's LogN); not while training.
    #[serde(default)]
    pub logn: Option<i64>,
    /// Chunks in which longer texts are read (dual chunk attention); not while training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunks: Option<ChunkConfig>,
}

/// Dual chunk attention (An et al. 2024; Qwen2, section 3.2): the places of keys begin anew in each chunk, and queries
/// meet them at distances that training knew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChunkConfig {
    /// Tokens of a chunk. A text that is no longer is read as ever.
    pub size: i64,
    /// The trained length: no key is as far away, or further.
    pub trained: i64,
}

/// A change of the angles for longer texts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum RotaryScaling {
    /// All angles are divided (Chen et al. 2023).
    Linear {
        /// By this.
        factor: f64,
    },
    /// The base grows with the length of the text, once that is beyond the trained one; not while training.
    Dynamic {
        /// Growth for each trained length.
        factor: f64,
        /// The trained length.
        trained: i64,
    },
    /// The same as Qwen does it, by whole doublings of the length.
    DynamicSteps {
        /// The trained length.
        trained: i64,
    },
    /// Slow angles are divided, fast ones are not (Peng et al. 2023, YaRN).
    Yarn {
        /// By this.
        factor: f64,
        /// The trained length.
        original: i64,
        /// Turns over the trained length from which on an angle stays as it is.
        #[serde(default = "beta_fast")]
        beta_fast: f64,
        /// Turns over the trained length up to which an angle is divided in full.
        #[serde(default = "beta_slow")]
        beta_slow: f64,
        /// What queries and keys are multiplied by; `0.1 ln(factor) + 1` where absent.
        #[serde(default)]
        attention_factor: Option<f64>,
    },
}

/// YaRN's defaults.
pub(super) const fn beta_fast() -> f64 {
    32.0
}
pub(super) const fn beta_slow() -> f64 {
    1.0
}

impl RotaryConfig {
    /// The angles of this base as they are.
    pub fn new(base: f64) -> Self {
        Self { base, scaling: None, logn: None, chunks: None }
    }

    /// Whether something is done for texts beyond the trained length.
    pub fn is_made_longer(&self) -> bool {
        self.scaling.is_some() || self.logn.is_some() || self.chunks.is_some()
    }

    /// What is wrong, in one line that begins with the key.
    pub(super) fn validate(&self) -> Result<(), String> {
        let positive = |key: &str, value: f64| {
            let is_fine = value > 0.0 && value.is_finite();
            if is_fine { Ok(()) } else { Err(format!("{key} = {value}: expected a positive number")) }
        };
        // At a base of 1 all angles are the same, and a length of 1 has no logarithm to divide by.
        let above_one = |key: &str, value: f64| {
            let is_fine = value > 1.0 && value.is_finite();
            if is_fine { Ok(()) } else { Err(format!("{key} = {value}: expected more than 1")) }
        };
        above_one("base", self.base)?;
        if let Some(trained) = self.logn {
            above_one("logn", trained as f64)?;
        }
        if let Some(ChunkConfig { size, trained }) = self.chunks
            && !(1..trained).contains(&size)
        {
            return Err(format!(
                "chunks.size = {size}: expected 1 or more and less than chunks.trained = {trained}"
            ));
        }
        match &self.scaling {
            None => Ok(()),
            Some(RotaryScaling::Linear { factor }) => positive("scaling.factor", *factor),
            Some(RotaryScaling::Dynamic { factor, trained }) => {
                positive("scaling.factor", *factor)?;
                positive("scaling.trained", *trained as f64)
            }
            Some(RotaryScaling::DynamicSteps { trained }) => positive("scaling.trained", *trained as f64),
            Some(RotaryScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor }) => {
                positive("scaling.factor", *factor)?;
                positive("scaling.original", *original as f64)?;
                positive("scaling.beta_fast", *beta_fast)?;
                positive("scaling.beta_slow", *beta_slow)?;
                attention_factor.map_or(Ok(()), |value| positive("scaling.attention_factor", value))
            }
        }
    }
}

/// What the place of each token does to its queries and keys.
#[derive(Debug)]
pub struct Rotation {
    turn: Turn,
    /// `[n, 1, 1]`, float32; what queries grow by.
    growth: Option<Tensor>,
    chunks: Option<ChunkTurns>,
}

/// Cosines and sines of angles, `[n, 1, k]` float32.
#[derive(Debug)]
struct Turn {
    cos: Tensor,
    sin: Tensor,
}

/// How queries are turned for the keys of other chunks than their own.
#[derive(Debug)]
pub struct ChunkTurns {
    /// Tokens of a chunk.
    pub size: i64,
    before: Turn,
    earlier: Turn,
}

/// The angles of one model.
#[derive(Debug)]
pub struct Rotary {
    config: RotaryConfig,
    head_width: i64,
    /// `[k / 2]` angles from one place to the next, for texts of the trained length.
    angles: Tensor,
    /// YaRN's temperature.
    scale: f64,
}

impl Rotary {
    /// For heads of `head_width` values.
    pub fn new(config: &RotaryConfig, head_width: i64, device: Device) -> Self {
        let plain: Vec<f64> =
            (0..head_width / 2).map(|i| config.base.powf(-2.0 * i as f64 / head_width as f64)).collect();
        let (angles, scale) = match &config.scaling {
            Some(RotaryScaling::Linear { factor }) => {
                (plain.iter().map(|angle| angle / factor).collect(), 1.0)
            }
            Some(RotaryScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor }) => {
                let range = (
                    pair_of(*beta_fast, config.base, *original, head_width).floor().max(0.0),
                    pair_of(*beta_slow, config.base, *original, head_width)
                        .ceil()
                        .min((head_width - 1) as f64),
                );
                (yarn_angles(&plain, *factor, range), attention_factor.unwrap_or(yarn_scale(*factor)))
            }
            Some(RotaryScaling::Dynamic { .. } | RotaryScaling::DynamicSteps { .. }) | None => (plain, 1.0),
        };
        let angles = Tensor::from_slice(&angles).to_kind(Kind::Float).to_device(device);
        Self { config: config.clone(), head_width, angles, scale }
    }

    /// The rotation of tokens at `places` `[n]` of texts of `lengths` `[n]` tokens. What depends on the length of a text
    /// is left out where `is_training`.
    pub fn rotation(&self, places: &Tensor, lengths: &Tensor, is_training: bool) -> Rotation {
        let places = places.to_kind(Kind::Float).unsqueeze(-1); // [n, 1]
        let alpha = self.alpha(lengths).filter(|_| !is_training);
        let turn = |places: &Tensor| self.turn(places, alpha.as_ref());
        let growth =
            self.config.logn.filter(|_| !is_training).map(|trained| {
                (((&places + 1.0).log() / (trained as f64).ln()).clamp_min(1.0)).unsqueeze(-1)
            });
        let Some(ChunkConfig { size, trained }) = self.config.chunks.filter(|_| !is_training) else {
            return Rotation { turn: turn(&places), growth, chunks: None };
        };
        let (in_chunk, furthest) = (places.fmod(size as f64), (trained - 1) as f64);
        let chunks = ChunkTurns {
            size,
            before: turn(&(&in_chunk + size as f64).clamp_max(furthest)),
            earlier: turn(&in_chunk.full_like(furthest)),
        };
        Rotation { turn: turn(&in_chunk), growth, chunks: Some(chunks) }
    }

    /// The turn of tokens at `places` `[n, 1]`, where the base has grown by `alpha` `[n]`.
    fn turn(&self, places: &Tensor, alpha: Option<&Tensor>) -> Turn {
        let angles = match alpha {
            None => places * &self.angles,
            // base * alpha ^ (k / (k - 2)) in place of base: the slowest angle is divided by alpha.
            Some(alpha) => {
                let pairs = Tensor::arange(self.head_width / 2, (Kind::Float, places.device()));
                let power = pairs * (-2.0 / (self.head_width - 2) as f64);
                places * &self.angles * alpha.unsqueeze(-1).pow(&power)
            }
        };
        let angles = Tensor::cat(&[&angles, &angles], -1).unsqueeze(1); // [n, 1, k]
        Turn { cos: angles.cos() * self.scale, sin: angles.sin() * self.scale }
    }

    /// `[n]` what the base grows by, where it depends on the length of the text.
    fn alpha(&self, lengths: &Tensor) -> Option<Tensor> {
        let lengths = lengths.to_kind(Kind::Double);
        let alpha = match self.config.scaling {
            Some(RotaryScaling::Dynamic { factor, trained }) => {
                lengths / trained as f64 * factor - (factor - 1.0)
            }
            Some(RotaryScaling::DynamicSteps { trained }) => {
                (((lengths / trained as f64).log2() + 1.0).ceil()).exp2() - 1.0
            }
            _ => return None,
        };
        Some(alpha.clamp_min(1.0).to_kind(Kind::Float))
    }
}

/// The pair of values whose angle makes `turns` turns over the trained length.
fn pair_of(turns: f64, base: f64, original: i64, head_width: i64) -> f64 {
    let length = original as f64 / (turns * std::f64::consts::TAU);
    head_width as f64 * length.ln() / (2.0 * base.ln())
}

fn yarn_angles(plain: &[f64], factor: f64, (low, high): (f64, f64)) -> Vec<f64> {
    /// Where both ends meet, the ramp is a step.
    const STEP: f64 = 0.001;
    let width = if low == high { STEP } else { high - low };
    let angle = |(i, plain): (usize, &f64)| {
        let ramp = ((i as f64 - low) / width).clamp(0.0, 1.0);
        plain / factor * ramp + plain * (1.0 - ramp)
    };
    plain.iter().enumerate().map(angle).collect()
}

fn yarn_scale(factor: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 }
}

impl Turn {
    fn of(&self, x: &Tensor) -> Tensor {
        rotate(x, &self.cos, &self.sin)
    }
}

impl Rotation {
    /// Cosines and sines `[n, 1, k]`, where queries are turned and nothing else.
    pub fn angles(&self) -> Option<(&Tensor, &Tensor)> {
        self.growth.is_none().then_some((&self.turn.cos, &self.turn.sin))
    }

    /// What is done for texts of which one has `longest` tokens, where that is more than a chunk.
    pub fn chunks(&self, longest: i64) -> Option<&ChunkTurns> {
        self.chunks.as_ref().filter(|chunks| chunks.size < longest)
    }

    /// Queries `[n, h, k]` and keys `[n, g, k]`, turned; computed in float32.
    pub fn turn(&self, q_nhk: &Tensor, k_ngk: &Tensor) -> (Tensor, Tensor) {
        (self.grown(self.turn.of(q_nhk)), self.turn.of(k_ngk))
    }

    /// The same in chunks.
    pub fn turn_in_chunks(
        &self,
        chunks: &ChunkTurns,
        q_nhk: &Tensor,
        k_ngk: &Tensor,
    ) -> (ChunkedQueries, Tensor) {
        let turned = |turn: &Turn| self.grown(turn.of(q_nhk));
        let [own, before, earlier] = [&self.turn, &chunks.before, &chunks.earlier].map(turned);
        (ChunkedQueries { own, before, earlier }, self.turn.of(k_ngk))
    }

    /// The `h` queries, `g` keys and `g` values of each token of `[n, h + 2 g, k]`, queries and keys turned.
    pub fn split(&self, qkv: &Tensor, heads: i64, kv_heads: i64) -> (Tensor, Tensor, Tensor) {
        let (q, k, v) = split_rotate(qkv, heads, kv_heads, &self.turn.cos, &self.turn.sin);
        (self.grown(q), k, v)
    }

    fn grown(&self, q_nhk: Tensor) -> Tensor {
        match &self.growth {
            Some(growth) => (&q_nhk * growth).to_kind(q_nhk.kind()),
            None => q_nhk,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(scaling: Option<RotaryScaling>) -> RotaryConfig {
        RotaryConfig { scaling, ..RotaryConfig::new(1e4) }
    }

    #[test]
    fn qwens_base_grows_by_whole_doublings() {
        let rotary =
            Rotary::new(&config(Some(RotaryScaling::DynamicSteps { trained: 2048 })), 128, Device::Cpu);
        let lengths = Tensor::from_slice(&[1i64, 2048, 2049, 4096, 8192, 16384]);
        let alpha = Vec::<f32>::try_from(rotary.alpha(&lengths).unwrap()).unwrap();
        assert_eq!(alpha, [1.0, 1.0, 3.0, 3.0, 7.0, 15.0]);
    }

    #[test]
    fn queries_grow_with_the_logarithm_of_their_place() {
        let config = RotaryConfig { logn: Some(2048), ..config(None) };
        let rotary = Rotary::new(&config, 8, Device::Cpu);
        let places = Tensor::from_slice(&[0i64, 2047, 4095, 8191]);
        let rotation = rotary.rotation(&places, &places, false);
        let growth = Vec::<f32>::try_from(rotation.growth.unwrap().flatten(0, -1)).unwrap();
        for (found, expected) in growth.iter().zip([1.0, 1.0, 1.0909, 1.1818]) {
            assert!((found - expected).abs() < 5e-5, "{growth:?}");
        }
        assert!(rotary.rotation(&places, &places, true).growth.is_none());
    }

    #[test]
    fn yarn_has_its_temperature_and_leaves_the_fastest_angle_alone() {
        let yarn = RotaryScaling::Yarn {
            factor: 4.0,
            original: 32768,
            beta_fast: beta_fast(),
            beta_slow: beta_slow(),
            attention_factor: None,
        };
        let rotary = Rotary::new(&config(Some(yarn)), 128, Device::Cpu);
        assert!((rotary.scale - 1.13863).abs() < 1e-5);
        let plain = Rotary::new(&config(None), 128, Device::Cpu).angles;
        let ratio = Vec::<f32>::try_from(plain / rotary.angles).unwrap();
        assert_eq!((ratio[0], ratio[63]), (1.0, 4.0));
        assert!(ratio.is_sorted());
    }

    /// Chunks of 4 tokens and 6 trained places, as in figure 2 of An et al.
    #[test]
    fn keys_of_other_chunks_are_met_at_places_that_training_knew() {
        let plain = Rotary::new(&config(None), 16, Device::Cpu);
        let chunks = Some(ChunkConfig { size: 4, trained: 6 });
        let chunked = Rotary::new(&RotaryConfig { chunks, ..config(None) }, 16, Device::Cpu);
        let places = Tensor::arange(10, (Kind::Int64, Device::Cpu));
        let rotation = chunked.rotation(&places, &places, false);
        let turns = rotation.chunks.as_ref().unwrap();
        let expected: [(&Turn, [i64; 10]); 3] = [
            (&rotation.turn, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]),
            (&turns.before, [4, 5, 5, 5, 4, 5, 5, 5, 4, 5]),
            (&turns.earlier, [5; 10]),
        ];
        for (turn, places) in expected {
            let places = Tensor::from_slice(&places);
            let exact = plain.rotation(&places, &places, false).turn;
            assert_eq!((&turn.cos, &turn.sin), (&exact.cos, &exact.sin));
        }
        assert!(chunked.rotation(&places, &places, true).chunks.is_none());
    }

    #[test]
    fn what_attention_sees_depends_on_distances_alone() {
        tch::manual_seed(1);
        let rotary = Rotary::new(&config(None), 16, Device::Cpu);
        let [q, k] = [0; 2].map(|_| Tensor::randn([5, 2, 16], (Kind::Float, Device::Cpu)));
        let scores = |first: i64| {
            let places = Tensor::arange_start(first, first + 5, (Kind::Int64, Device::Cpu));
            let rotation = rotary.rotation(&places, &places, true);
            let (q, k) = rotation.turn(&q, &k);
            let [q, k] = [q, k].map(|x| x.transpose(0, 1));
            q.matmul(&k.transpose(1, 2))
        };
        assert!((scores(0) - scores(40)).abs().max().double_value(&[]) < 1e-4);
    }
}
