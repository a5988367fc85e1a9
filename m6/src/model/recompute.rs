//! A stack whose blocks keep nothing but their input: each is computed again in the backward pass, which takes one
//! forward pass more and far less memory (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
//!
//! Blocks run without a graph, which is cut before the first and after the last one. The gradients are those of
//! [`Transformer::forward`], on the CPU to the last bit.

use m6_runtime::attention::Layout;
use m6_runtime::device::{rng_state, set_rng_state};
use m6_runtime::graph::{Cut, backward};
use tch::Tensor;

use super::attention::Heads;
use super::mode::Mode;
use super::moe::RouterLosses;
use super::rotary::Rotation;
use super::sequence::Tokens;
use super::transformer::{Hidden, Pass, Stepped, Transformer};
use crate::error::Result;

/// A forward pass in training whose blocks are yet to be computed again.
#[derive(Debug)]
pub struct Recompute<'a> {
    transformer: &'a Transformer,
    layout: &'a Layout,
    rotation: Option<Rotation>,
    real: i64,
    embedded: Cut,
    text_head: Cut,
    /// `[n, d]` what goes into each block, leaves.
    inputs: Vec<Tensor>,
    /// `[n, d]` what comes out of the last, a leaf.
    output: Tensor,
    /// The random state before each block, where something is left to chance.
    random: Vec<Tensor>,
    /// Of the blocks with experts; what is made of them are leaves.
    losses: Vec<RouterLosses>,
}

impl<'a> Recompute<'a> {
    /// As [`Transformer::forward`] in training. What is made of the result is run backward first, then
    /// [`Recompute::backward`].
    ///
    /// # Errors
    /// When libtorch refuses an attention call.
    pub fn forward(
        transformer: &'a Transformer,
        tokens: &Tokens,
        pictures: Option<&Tensor>,
        layout: &'a Layout,
        real: i64,
    ) -> Result<(Self, Hidden)> {
        let embedded = Cut::new(transformer.drop(transformer.embed(tokens, pictures), Mode::Train));
        let mut pass = Self {
            rotation: transformer.rotation(&tokens.places, &tokens.lengths, Mode::Train),
            text_head: Cut::new(transformer.text_head()),
            inputs: Vec::new(),
            output: embedded.leaf.shallow_clone(),
            random: Vec::new(),
            losses: Vec::new(),
            transformer,
            layout,
            real,
            embedded,
        };
        pass.run()?;
        let x_nd = transformer.norm_before(transformer.blocks()).forward(&pass.output);
        let routers = transformer.router_totals(&pass.losses);
        Ok((pass, Hidden { x_nd, routers }))
    }

    /// [`Transformer::text_head`] for what is made of the result: where the input table is shared, both of its
    /// gradients are to arrive together.
    pub fn text_head(&self) -> &Tensor {
        &self.text_head.leaf
    }

    /// Computes block after block again, from the last to the first, and adds the gradients of all parameters.
    ///
    /// # Errors
    /// When libtorch refuses.
    pub fn backward(mut self) -> Result<()> {
        let device = self.embedded.leaf.device();
        let random = if self.random.is_empty() { None } else { Some(rng_state(device)?) };
        let mut gradient = self.output.grad();
        while let Some(input) = self.inputs.pop() {
            if let Some(state) = self.random.pop() {
                set_rng_state(device, &state)?;
            }
            let (output, losses) = self.step(self.inputs.len(), &input)?;
            let mut outputs = vec![(output, gradient)];
            if let Some((again, first)) = losses.and_then(|again| Some((again, self.losses.pop()?))) {
                outputs.extend([(again.loss, first.loss.grad()), (again.mean_e, first.mean_e.grad())]);
            }
            backward(outputs)?;
            gradient = input.grad();
        }
        if let Some(state) = random {
            set_rng_state(device, &state)?;
        }
        Ok(backward([self.embedded.output(), self.text_head.output()])?)
    }

    /// Runs all blocks without a graph.
    fn run(&mut self) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let is_random = self.transformer.config().is_random();
        for index in 0..self.transformer.blocks() {
            if is_random {
                self.random.push(rng_state(self.output.device())?);
            }
            let (output, losses) = self.step(index, &self.output)?;
            self.inputs.push(std::mem::replace(&mut self.output, output.set_requires_grad(true)));
            self.losses.extend(losses.map(RouterLosses::into_leaves));
        }
        Ok(())
    }

    fn step(&self, index: usize, x_nd: &Tensor) -> Result<(Tensor, Option<RouterLosses>)> {
        let window = self.transformer.config().window(index);
        let mut attend = |heads: &Heads<'_>| heads.attend(self.layout, window);
        let pass = Pass { rotation: self.rotation.as_ref(), real: self.real, mode: Mode::Train };
        let normed = self.transformer.norm_before(index).forward(x_nd);
        let Stepped { x_nd, fed_nd, losses } =
            self.transformer.step(index, x_nd, &normed, pass, &mut attend)?;
        Ok((fed_nd + x_nd, losses))
    }
}
