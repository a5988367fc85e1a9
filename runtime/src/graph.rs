//! Backward passes in parts: a graph that is cut is run backward from its end, each part with the gradients that the
//! part behind it gave.

use tch::Tensor;

use crate::error::Result;
use crate::ffi;

/// A tensor at which a graph is cut.
#[derive(Debug)]
pub struct Cut {
    before: Tensor,
    /// The same values as a leaf, for the part behind the cut.
    pub leaf: Tensor,
}

impl Cut {
    /// Cuts the graph of `tensor` off.
    pub fn new(tensor: Tensor) -> Self {
        Self { leaf: tensor.detach().set_requires_grad(true), before: tensor }
    }

    /// The tensor with its graph, and the gradient that its leaf has got.
    pub fn output(self) -> (Tensor, Tensor) {
        let gradient = self.leaf.grad();
        (self.before, gradient)
    }
}

/// Runs a graph backward from `outputs`, each with the gradient beside it, in one pass; adds to the gradients of the
/// leaves. An output whose gradient is undefined, since nothing was made of it, does not count.
///
/// # Errors
/// When libtorch refuses, such as for an output without a graph.
pub fn backward(outputs: impl IntoIterator<Item = (Tensor, Tensor)>) -> Result<()> {
    let (outputs, gradients): (Vec<_>, Vec<_>) =
        outputs.into_iter().filter(|(_, gradient)| gradient.defined()).unzip();
    let (outputs, gradients) = (ffi::pointers(&outputs), ffi::pointers(&gradients));
    // SAFETY: two lists of equal length of tensors that live until the end of this function.
    ffi::check(unsafe { ffi::m6_backward(outputs.len(), outputs.as_ptr(), gradients.as_ptr()) })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn a_graph_that_is_cut_gives_the_gradients_of_the_whole() {
        let weight = Tensor::arange(6, (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let front = |weight: &Tensor| weight.sin();
        let end = |x: &Tensor, tied: &Tensor| (x.square() * tied).sum(Kind::Float);
        end(&front(&weight), &weight).backward();
        let whole = weight.grad().copy();

        let mut held = weight.grad();
        let _ = held.zero_();
        let (front, tied) = (Cut::new(front(&weight)), Cut::new(weight.shallow_clone()));
        let unused = Cut::new(weight.exp());
        end(&front.leaf, &tied.leaf).backward();
        assert_eq!(weight.grad().abs().sum(Kind::Float).double_value(&[]), 0.0, "the cut holds it back");
        backward([front.output(), tied.output(), unused.output()]).unwrap();
        assert_eq!(weight.grad(), whole);
    }

    #[test]
    fn an_output_without_a_graph_is_an_error_of_one_line() {
        let plain = Tensor::ones([2], (Kind::Float, Device::Cpu));
        let message = backward([(plain.shallow_clone(), plain)]).unwrap_err().to_string();
        assert_eq!(message.lines().count(), 1, "{message}");
    }
}
