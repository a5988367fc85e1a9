//! Pictures from prompts: codes one at a time, then the image tokenizer's decoder.

use m6_data::picture::Rgb8;
use m6_vqgan::to_pictures;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tch::{Device, Tensor};

use super::cache::KvCache;
use super::drawing::Drawing;
use super::rerank::best_of_each;
use super::sampler::{Sampling, guide};
use crate::error::{Error, Result};
use crate::model::{Model, Sequence, Transformer};
use crate::objectives::{Piece, null_prompt};

/// Rows that go through the transformer at once on the CPU: more gain no speed there and take memory.
const ROWS_CPU: usize = 32;
/// Rows that go through the transformer at once on a GPU.
const ROWS_GPU: usize = 256;
/// Pictures that are decoded at once; the decoder's activations are far larger than the transformer's.
const DECODE_BATCH: usize = 8;

/// What to draw.
#[derive(Debug, Clone, PartialEq)]
pub struct DrawRequest {
    /// What the pictures show; an empty prompt draws anything.
    pub prompts: Vec<String>,
    /// Pictures of each prompt.
    pub count: usize,
    /// Drawings of which the one that shows its prompt best becomes the picture: that of which the prompt is the
    /// likeliest caption. 1 takes what comes.
    pub best_of: usize,
    /// Drawing `i` of every prompt comes from the random stream of `seed + i` (wrapping), so that it can be drawn
    /// again alone. A picture is chosen among `best_of` drawings that follow each other.
    pub seed: u64,
    /// How codes are chosen.
    pub sampling: Sampling,
    /// Guidance scale: 1 draws from the prompt alone, larger follows it more closely, 0 ignores it.
    pub guidance: f64,
}

impl DrawRequest {
    /// Checks what does not depend on a model; values are named as the flags of the command.
    ///
    /// # Errors
    /// When a setting is out of its range.
    pub fn validate(&self) -> Result<()> {
        self.sampling.validate()?;
        if self.best_of == 0 {
            return Err(Error::Usage("--best-of 0: expected 1 or more".into()));
        }
        if self.guidance >= 0.0 && self.guidance.is_finite() {
            return Ok(());
        }
        Err(Error::Usage(format!("--guidance {}: expected 0 or more", self.guidance)))
    }

    /// Drawings of each prompt.
    fn drawings(&self) -> usize {
        self.count * self.best_of
    }

    /// Codes that all drawings together have.
    pub fn codes(&self, model: &Model) -> u64 {
        let grid = model.info.code_grid as u64;
        (self.prompts.len() * self.drawings()) as u64 * grid * grid
    }

    /// The prompts as ids; an empty prompt becomes the null prompt.
    ///
    /// # Errors
    /// When a prompt is longer than the model takes or has no token in its vocabulary.
    pub(crate) fn prefixes(&self, model: &Model) -> Result<Vec<Vec<i64>>> {
        let limit = model.info.model.max_text as usize;
        let ids = |prompt: &String| {
            let ids = model.tokenizer.encode(prompt.trim())?;
            match ids.len() {
                0 if prompt.trim().is_empty() => Ok(null_prompt(model.info.vocab)),
                0 => Err(Error::Usage(format!(
                    "the prompt {prompt:?} has no token in this model's vocabulary"
                ))),
                n if n > limit => Err(Error::Usage(format!(
                    "the prompt {prompt:?} has {n} tokens; this model takes at most {limit}"
                ))),
                _ => Ok(ids.into_iter().map(i64::from).collect()),
            }
        };
        self.prompts.iter().map(ids).collect()
    }
}

/// Draws `count` pictures of each prompt, prompt after prompt, each the best of `best_of` drawings. `on_progress` is
/// called with the number of codes that were just chosen; in all they are [`DrawRequest::codes`].
///
/// Pictures are drawn in groups, but each from a random stream of its own: apart from the rounding of matrix
/// products of other sizes, a picture is the same whatever is drawn beside it.
///
/// # Errors
/// When a setting is out of its range, a prompt is longer than the model takes, or libtorch refuses an operation.
pub fn draw(model: &Model, request: &DrawRequest, on_progress: impl FnMut(u64)) -> Result<Vec<Drawing>> {
    let _guard = tch::no_grad_guard();
    request.validate()?;
    let prefixes = request.prefixes(model)?;
    let jobs: Vec<Job> = prefixes
        .iter()
        .flat_map(|prefix| {
            (0..request.drawings()).map(move |i| Job { prefix, seed: request.seed.wrapping_add(i as u64) })
        })
        .collect();
    let sampler = Sampler {
        transformer: &model.transformer,
        device: model.params.device(),
        sampling: request.sampling,
        guidance: request.guidance,
    };
    let codes = sampler.codes(&jobs, on_progress)?;
    let pictures = decode(model, &codes)?;
    let drawings = jobs.iter().zip(codes).zip(pictures).enumerate();
    let drawings = drawings
        .map(|(i, ((job, codes), picture))| Drawing {
            prompt: request.prompts[i / request.drawings()].clone(),
            seed: job.seed,
            codes,
            picture,
        })
        .collect();
    best_of_each(model, drawings, request.best_of)
}

/// One picture to draw.
#[derive(Debug, Clone, Copy)]
struct Job<'a> {
    prefix: &'a [i64],
    seed: u64,
}

/// Draws codes; what all pictures of a request have in common.
struct Sampler<'a> {
    transformer: &'a Transformer,
    device: Device,
    sampling: Sampling,
    guidance: f64,
}

impl Sampler<'_> {
    /// Codes of each job, in groups that fit the row budget.
    fn codes(&self, jobs: &[Job], mut on_progress: impl FnMut(u64)) -> Result<Vec<Vec<u32>>> {
        let budget = if self.device.is_cuda() { ROWS_GPU } else { ROWS_CPU };
        let mut codes = Vec::with_capacity(jobs.len());
        let mut rest = jobs;
        while !rest.is_empty() {
            let mut rows = 0;
            let fits = rest.iter().take_while(|job| {
                rows += 1 + usize::from(self.is_guided(job));
                rows <= budget
            });
            let (group, later) = rest.split_at(fits.count());
            codes.extend(self.group(group, &mut on_progress)?);
            rest = later;
        }
        Ok(codes)
    }

    /// Whether a picture needs a second row, without its prompt: a null prompt is that row, and at scale 1 the
    /// mixture is the guided row alone.
    fn is_guided(&self, job: &Job) -> bool {
        self.guidance != 1.0 && job.prefix != null_prompt(self.transformer.vocab())
    }

    /// Codes of the pictures of one batch: a row for each, then one more for each that is guided.
    fn group(&self, jobs: &[Job], on_progress: &mut impl FnMut(u64)) -> Result<Vec<Vec<u32>>> {
        let vocab = self.transformer.vocab();
        let guided: Vec<usize> = (0..jobs.len()).filter(|&i| self.is_guided(&jobs[i])).collect();
        let prompts = jobs.iter().map(|job| vec![Piece::Text(job.prefix.to_vec())]);
        let nulls = guided.iter().map(|_| vec![Piece::Text(null_prompt(vocab))]);
        let prefixes: Vec<Vec<Piece>> = prompts.chain(nulls).collect();

        let places = self.transformer.config().code_order.places(self.transformer.positions().code_grid);
        let length = places.len();
        let mut cache = KvCache::prefill(self.transformer, self.device, &prefixes, length as i64)?;
        let mut rngs: Vec<ChaCha8Rng> = jobs.iter().map(|job| ChaCha8Rng::seed_from_u64(job.seed)).collect();
        let mut codes = vec![Vec::with_capacity(length); jobs.len()];
        for (step, &place) in places.iter().enumerate() {
            let mut tokens = Sequence::new(vocab, self.transformer.positions());
            for drawn in codes.iter().chain(guided.iter().map(|&i| &codes[i])) {
                match drawn.last() {
                    None => tokens.begin_of_image(Some(place)),
                    Some(&code) => tokens.code(code, places[step - 1], Some(place)),
                }
            }
            let hidden = cache.step(self.transformer, &tokens.to_device(self.device)?)?;
            // The picture ends where its grid is full, so the end of the image is no choice.
            let logits = self.transformer.code_logits(&hidden).narrow(1, 0, vocab.codes);
            let mut logits = host_rows(&logits)?;
            let unguided = logits.split_off(jobs.len());
            for (&i, unguided) in guided.iter().zip(&unguided) {
                guide(&mut logits[i], unguided, self.guidance);
            }
            for ((drawn, logits), rng) in codes.iter_mut().zip(&logits).zip(&mut rngs) {
                drawn.push(self.sampling.sample(logits, rng) as u32);
            }
            on_progress(jobs.len() as u64);
        }
        let by_place = |drawn: Vec<u32>| {
            let mut codes = vec![0; length];
            for (code, &place) in drawn.into_iter().zip(&places) {
                codes[place as usize] = code;
            }
            codes
        };
        Ok(codes.into_iter().map(by_place).collect())
    }
}

/// A float32 matrix as rows on the host.
fn host_rows(matrix: &Tensor) -> Result<Vec<Vec<f32>>> {
    let width = matrix.size()[1] as usize;
    let flat = Vec::<f32>::try_from(matrix.flatten(0, 1)).map_err(m6_runtime::RuntimeError::from)?;
    Ok(flat.chunks(width).map(<[f32]>::to_vec).collect())
}

fn decode(model: &Model, codes: &[Vec<u32>]) -> Result<Vec<Rgb8>> {
    let grid = model.info.code_grid;
    let mut pictures = Vec::with_capacity(codes.len());
    for batch in codes.chunks(DECODE_BATCH) {
        let flat: Vec<i64> = batch.iter().flatten().map(|&code| i64::from(code)).collect();
        let codes = Tensor::from_slice(&flat).view([-1, grid * grid]).to_device(model.params.device());
        pictures.extend(to_pictures(&model.vqgan.decode_codes(&codes, grid, grid)?));
    }
    Ok(pictures)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::testing::{SIDE, tiny, tiny_model, tiny_model_in};
    use m6_runtime::FloatDtype;

    const SAMPLING: Sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0 };

    fn request(prompts: &[&str], count: usize, seed: u64) -> DrawRequest {
        let prompts = prompts.iter().map(|p| (*p).to_owned()).collect();
        DrawRequest { prompts, count, best_of: 1, seed, sampling: SAMPLING, guidance: 3.0 }
    }

    #[test]
    fn a_picture_does_not_depend_on_those_beside_it() {
        let model = tiny_model();
        let many = draw(&model, &request(&["a red heart", "", "红"], 3, 7), |_| ()).unwrap();
        assert_eq!(many.len(), 9);
        for drawing in &many {
            let alone = draw(&model, &request(&[&drawing.prompt], 1, drawing.seed), |_| ()).unwrap();
            assert_eq!(alone[0].codes, drawing.codes, "{:?} with seed {}", drawing.prompt, drawing.seed);
            assert_eq!((drawing.picture.width, drawing.picture.height), (SIDE, SIDE));
        }
        assert_eq!(many.iter().map(|d| d.seed).collect::<Vec<_>>(), [7, 8, 9, 7, 8, 9, 7, 8, 9]);
        assert_ne!(many[0].codes, many[1].codes);
        assert_ne!(many[0].codes, many[6].codes);
    }

    /// The drawings, and by what their captions are worth which of them are taken.
    #[test]
    fn a_model_held_in_bf16_draws_what_it_does_in_float32() {
        let (narrow, wide) = (tiny_model_in(FloatDtype::Bf16), tiny_model());
        let values = narrow.params.tensors();
        for (name, mut tensor) in wide.params.tensors() {
            tensor.copy_(&values[&name]);
        }
        let request = DrawRequest { best_of: 3, ..request(&["a red heart", "红"], 2, 5) };
        let drawn = |model: &Model| {
            let drawings = draw(model, &request, |_| ()).unwrap().into_iter();
            drawings.map(|drawing| (drawing.seed, drawing.codes)).collect::<Vec<_>>()
        };
        assert_eq!(drawn(&narrow), drawn(&wide));
        assert!(values.values().any(|tensor| tensor.kind() == tch::Kind::BFloat16));
    }

    #[test]
    fn progress_counts_every_code_once() {
        let model = tiny_model();
        let mut done = 0;
        let request = DrawRequest { best_of: 2, ..request(&["a", "b"], 10, 1) };
        let drawings = draw(&model, &request, |chosen| done += chosen).unwrap();
        assert_eq!(request.codes(&model), 2 * drawings.iter().map(|d| d.codes.len() as u64).sum::<u64>());
        assert_eq!(done, request.codes(&model));
    }

    /// The codes that greedy choice takes from mixed logits, by running the whole sequence anew for each code.
    fn by_definition(transformer: &Transformer, prompt: &[i64], guidance: f64) -> Vec<u32> {
        let places = transformer.config().code_order.places(4);
        let logits = |prefix: &[i64], codes: &[u32]| {
            let prefix = [vec![Piece::Text(prefix.to_vec())]];
            let mut cache = KvCache::prefill(transformer, Device::Cpu, &prefix, 17).unwrap();
            let mut last = Tensor::new();
            for step in 0..=codes.len() {
                let mut tokens = Sequence::new(transformer.vocab(), transformer.positions());
                match step {
                    0 => tokens.begin_of_image(Some(places[0])),
                    _ => tokens.code(codes[step - 1], places[step - 1], Some(places[step])),
                }
                last = cache.step(transformer, &tokens.to_device(Device::Cpu).unwrap()).unwrap();
            }
            transformer.code_logits(&last).narrow(1, 0, transformer.vocab().codes)
        };
        let mut codes = Vec::new();
        for _ in 0..16 {
            let (with, without) = (logits(prompt, &codes), logits(&null_prompt(transformer.vocab()), &codes));
            let mixed = &without + (with - &without) * guidance;
            codes.push(mixed.argmax(-1, false).int64_value(&[0]) as u32);
        }
        let mut in_place = vec![0; codes.len()];
        places.iter().zip(codes).for_each(|(&place, code)| in_place[place as usize] = code);
        in_place
    }

    #[test]
    fn guidance_mixes_each_picture_with_its_own_unguided_row() {
        let _guard = tch::no_grad_guard();
        let (_params, transformer) = tiny();
        let (first, second, null) = (vec![1, 2, 3], vec![9], null_prompt(transformer.vocab()));
        let sampler = |guidance| Sampler {
            transformer: &transformer,
            device: Device::Cpu,
            sampling: Sampling { temperature: 0.0, ..SAMPLING },
            guidance,
        };
        let jobs = [&null, &first, &second].map(|prefix| Job { prefix, seed: 0 });
        for guidance in [1.0, 2.5] {
            let drawn = sampler(guidance).codes(&jobs, |_| ()).unwrap();
            for (job, drawn) in jobs.iter().zip(drawn) {
                assert_eq!(drawn, by_definition(&transformer, job.prefix, guidance), "guidance {guidance}");
            }
        }
    }

    #[test]
    fn a_long_prompt_and_bad_settings_are_named() {
        let model = tiny_model();
        let message = |request: &DrawRequest| draw(&model, request, |_| ()).unwrap_err().to_string();
        assert_eq!(
            message(&request(&["a", "seventeen letters"], 1, 1)),
            "the prompt \"seventeen letters\" has 17 tokens; this model takes at most 16"
        );
        let negative = DrawRequest { guidance: -1.0, ..request(&["a"], 1, 1) };
        assert_eq!(message(&negative), "--guidance -1: expected 0 or more");
        let none = DrawRequest { best_of: 0, ..request(&["a"], 1, 1) };
        assert_eq!(message(&none), "--best-of 0: expected 1 or more");
        let cold = Sampling { temperature: -0.5, ..SAMPLING };
        assert!(
            message(&DrawRequest { sampling: cold, ..request(&["a"], 1, 1) })
                .starts_with("--temperature -0.5")
        );
    }
}
