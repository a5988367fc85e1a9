//! CUDA graphs: work that is recorded once and launched as one, which saves the host the launches of all its kernels.

use tch::Device;

use crate::error::{Result, RuntimeError};

/// Recorded work. Replaying it reads and writes the tensors that it was recorded with, at their places in memory: inputs
/// are given to it by copying into them, and results are the tensors that the recorded work returned.
#[derive(Debug)]
pub struct CudaGraph(calls::Recording);

impl CudaGraph {
    /// Records what `work` launches on the GPU `device`. Nothing is computed: its results have their values after the
    /// first [`CudaGraph::replay`]. The work has to have run before, with inputs of the same shapes, so that libraries
    /// have chosen their kernels, and it may neither wait for the device nor depend on numbers of the host that change.
    /// Numbers at random are those of the generator's state at each replay. Weights whose bf16 copies products read may be
    /// written by AdamW alone: another's write in a replay would leave the copy as it was.
    ///
    /// # Errors
    /// Those of the work, or when there is no such GPU or CUDA refuses.
    pub fn record<T, E: From<RuntimeError>>(
        device: Device,
        work: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<(Self, T), E> {
        let recording = calls::Recording::begin(device)?;
        // Ended by its drop where the work panics.
        let made = work();
        Ok((Self(recording.end()?), made?))
    }

    /// Launches the work.
    ///
    /// # Errors
    /// When CUDA refuses.
    pub fn replay(&self) -> Result<()> {
        self.0.replay()
    }
}

/// The calls of `csrc/cuda_graph.cpp`.
#[cfg(feature = "cuda")]
mod calls {
    use std::ffi::c_void;
    use std::ptr::null_mut;

    use super::*;
    use crate::ffi;

    #[derive(Debug)]
    pub(super) struct Recording {
        raw: *mut c_void,
        has_ended: bool,
    }

    impl Recording {
        pub(super) fn begin(device: Device) -> Result<Self> {
            let Device::Cuda(index) = device else {
                return Err(RuntimeError::Torch(format!("{device:?} records no work: expected a GPU")));
            };
            let mut raw = null_mut();
            // SAFETY: `raw` receives a recording on success.
            ffi::check(unsafe { ffi::m6_graph_begin(index as i64, &mut raw) })?;
            Ok(Self { raw, has_ended: false })
        }

        pub(super) fn end(mut self) -> Result<Self> {
            self.has_ended = true;
            // SAFETY: begun, and ended once.
            ffi::check(unsafe { ffi::m6_graph_end(self.raw) })?;
            Ok(self)
        }

        pub(super) fn replay(&self) -> Result<()> {
            // SAFETY: a recording that has ended.
            ffi::check(unsafe { ffi::m6_graph_replay(self.raw) })
        }
    }

    impl Drop for Recording {
        fn drop(&mut self) {
            if !self.has_ended {
                // SAFETY: as above. A panic is on its way and says more than a problem here could.
                let _ = ffi::check(unsafe { ffi::m6_graph_end(self.raw) });
            }
            // SAFETY: made by `m6_graph_begin`, and dropped once.
            unsafe { ffi::m6_graph_drop(self.raw) }
        }
    }
}

/// A build that knows no GPU records nothing.
#[cfg(not(feature = "cuda"))]
mod calls {
    use super::*;

    #[derive(Debug)]
    pub(super) enum Recording {}

    impl Recording {
        pub(super) fn begin(device: Device) -> Result<Self> {
            Err(RuntimeError::Torch(format!("{device:?} records no work: this build has no `cuda`")))
        }

        pub(super) fn end(self) -> Result<Self> {
            match self {}
        }

        pub(super) fn replay(&self) -> Result<()> {
            match *self {}
        }
    }
}

/// Need a GPU; run with `cargo test --features cuda`.
#[cfg(all(test, feature = "cuda"))]
mod tests {
    use tch::{Kind, Tensor};

    use super::*;
    use crate::fused::linear;
    use crate::optim::{Ema, Optimizer, OptimizerConfig};
    use crate::params::{Group, Init, Params};

    const CUDA: Device = Device::Cuda(0);

    /// Steps on inputs and noise at random, with averaged weights that are swapped in and out in between; as graphs from
    /// the third step on, or none of them. Returns losses and weights.
    fn train(as_graph: bool) -> (Vec<f64>, Tensor) {
        let params = Params::new(CUDA, 5);
        let first = params.add("first", &[64, 32], Init::Normal(0.3), Group::Decay);
        let second = params.add("second", &[1, 64], Init::Normal(0.3), Group::Decay);
        let mut optimizer = Optimizer::new(&params, OptimizerConfig::default());
        let mut ema = Ema::new(&params, 0.5);
        let input = Tensor::zeros([16, 32], (Kind::BFloat16, CUDA));
        let mut graph = None;
        let mut losses = Vec::new();
        for step in 0..8 {
            tch::manual_seed(step);
            let drawn = Tensor::randn([16, 32], (Kind::Float, CUDA)).to_kind(Kind::BFloat16);
            input.shallow_clone().copy_(&drawn);
            optimizer.set_lr(0.01 * (step + 1) as f64);
            let mut work = || {
                optimizer.zero_grad()?;
                let hidden = linear(&(&input + input.randn_like()), &first, None).relu();
                let loss = linear(&hidden, &second, None).square().mean(Kind::Float);
                loss.backward();
                let _ = optimizer.step(1.0)?;
                Result::Ok(loss.detach())
            };
            let loss = match &graph {
                None => work().unwrap(),
                Some((graph, loss)) => {
                    CudaGraph::replay(graph).unwrap();
                    Tensor::shallow_clone(loss)
                }
            };
            losses.push(loss.double_value(&[]));
            if as_graph && step == 2 {
                graph = Some(CudaGraph::record(CUDA, work).unwrap());
            }
            ema.update(step as u64).unwrap();
            if step % 2 == 1 {
                ema.swap();
                losses.push(linear(&input, &first, None).mean(Kind::Float).double_value(&[]));
                ema.swap();
            }
        }
        (losses, first.detach().copy())
    }

    #[test]
    fn a_graph_takes_the_steps_that_its_work_takes() {
        let (plain, recorded) = (train(false), train(true));
        assert_eq!(plain.0, recorded.0);
        assert_eq!(plain.1, recorded.1);
    }
}
