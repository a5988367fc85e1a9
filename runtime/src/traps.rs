//! Traps of tch 0.24 that the code steers around, each pinned by a test that fails when tch mends it. Those with a
//! better home are tested there: strict loading and repeated names in `params`, bf16 slices in `weights`, initial
//! widths in `nn`, undefined gradients in `optim`.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::{Device, Kind, Tensor};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

fn leaf() -> Tensor {
    Tensor::ones([2], FLOAT).set_requires_grad(true)
}

fn tracks_gradients() -> bool {
    (leaf() * 2.0).requires_grad()
}

/// Why this workspace uses `no_grad_guard` and never the closure.
#[test]
fn the_no_grad_closure_stays_on_after_a_panic_and_the_guard_does_not() {
    let tracked = std::thread::spawn(|| {
        let guarded = catch_unwind(|| {
            let _guard = tch::no_grad_guard();
            panic!("inside the guard");
        });
        let after_guard = tracks_gradients();
        let closure = catch_unwind(|| tch::no_grad(|| panic!("inside the closure")));
        assert!(guarded.is_err() && closure.is_err());
        (after_guard, tracks_gradients())
    });
    assert_eq!(tracked.join().unwrap(), (true, false));
}

/// Why every thread that runs a model takes a guard of its own.
#[test]
fn a_new_thread_tracks_gradients_inside_anothers_guard() {
    let _guard = tch::no_grad_guard();
    assert!(!tracks_gradients());
    assert!(std::thread::spawn(tracks_gradients).join().unwrap());
}

/// Why residual sums are written `x = y + x`, whatever a lint says: the assignment operators work in place, and the
/// backward pass of the square needs the old value.
#[test]
fn assignment_operators_work_in_place() {
    let x = leaf() * 1.0;
    let squared = x.square();
    let mut sum = x.shallow_clone();
    sum += 1.0;
    assert_eq!(x.double_value(&[0]), 2.0, "the other handle has changed as well");
    assert!(squared.sum(Kind::Float).f_backward().is_err());
}

/// Why no recovery rests on the fallible functions: those that take a scalar panic where they should give an error.
#[test]
fn fallible_functions_with_a_scalar_panic() {
    let outcome = catch_unwind(AssertUnwindSafe(|| leaf().f_fill_(1.0).is_err()));
    assert!(outcome.is_err());
}
