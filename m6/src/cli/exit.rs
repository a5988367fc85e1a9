//! How the program ends: one line on standard error and an exit code.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook};
use std::process::ExitCode;

use m6::{Error, Result};
use m6_data::DataError;
use m6_run::RunError;
use m6_runtime::RuntimeError;
use m6_vqgan::VqganError;

const FAILURE: u8 = 1;
const WRONG_USE: u8 = 2;

/// Runs a command and turns its result into an exit code. A panic, such as libtorch being out of memory, is a failure
/// of one line too, with a backtrace before it where `RUST_BACKTRACE` asks for one.
pub fn run(command: impl FnOnce() -> Result<()>) -> ExitCode {
    if std::env::var_os("RUST_BACKTRACE").is_none_or(|value| value == "0") {
        // A worker's panic reaches its consumer as an error, and the main thread's is reported below.
        set_hook(Box::new(|_| ()));
    }
    // Nothing of the command is looked at after a panic.
    let (line, code) = match catch_unwind(AssertUnwindSafe(command)) {
        Ok(Ok(())) => return ExitCode::SUCCESS,
        Ok(Err(error)) => {
            (error.to_string().replace('\n', " "), if is_wrong_use(&error) { WRONG_USE } else { FAILURE })
        }
        Err(payload) => (panic_line(payload.as_ref()), FAILURE),
    };
    eprintln!("m6: {line}");
    ExitCode::from(code)
}

fn is_wrong_use(error: &Error) -> bool {
    match error {
        Error::Usage(_) => true,
        Error::Run(error) => is_wrong_config(error),
        Error::Runtime(error) => is_wrong_device(error),
        Error::Data(error) => is_wrong_data_setting(error),
        Error::Vqgan(error) => match error {
            VqganError::Config { .. } => true,
            VqganError::Run(error) => is_wrong_config(error),
            VqganError::Runtime(error) => is_wrong_device(error),
            VqganError::Data(error) => is_wrong_data_setting(error),
            _ => false,
        },
        Error::File { .. } => false,
    }
}

fn is_wrong_config(error: &RunError) -> bool {
    matches!(
        error,
        RunError::ConfigSyntax { .. }
            | RunError::ConfigKey { .. }
            | RunError::Override { .. }
            | RunError::OtherConfig { .. }
    )
}

fn is_wrong_device(error: &RuntimeError) -> bool {
    matches!(error, RuntimeError::Device { .. })
}

fn is_wrong_data_setting(error: &DataError) -> bool {
    matches!(
        error,
        DataError::Pattern { .. }
            | DataError::Mixture { .. }
            | DataError::CaptionField { .. }
            | DataError::Transform { .. }
            | DataError::Filter { .. }
            | DataError::VocabSize { .. }
    )
}

/// The first line of a panic's message. tch panics with the debug form of libtorch's report, in which line ends are
/// written out and some thirty C++ frames follow the first.
fn panic_line(payload: &(dyn Any + Send)) -> String {
    let message = payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    match message.split_once("an `Err` value: Torch(\"") {
        Some((_, report)) => {
            let line = report.split("\\n").next().unwrap_or(report);
            format!("libtorch: {}", line.trim_end_matches("\")").replace("\\\"", "\""))
        }
        None => format!("internal error: {}", message.lines().next().unwrap_or(message)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_use_is_told_from_failure() {
        let override_error = || RunError::Override { text: "a".into(), message: "b".into() };
        let device = RuntimeError::Device { asked: "tpu".into(), reason: "unknown".into() };
        let pattern = DataError::Pattern { pattern: "x".into(), reason: "no such file".into() };
        for error in [
            Error::Usage("-n 0".into()),
            override_error().into(),
            VqganError::from(override_error()).into(),
            device.into(),
            pattern.into(),
        ] {
            assert!(is_wrong_use(&error), "{error}");
        }
        let file = Error::File { path: "x".into(), problem: "y".into() };
        for error in [file, RunError::NoRun("x".into()).into(), RuntimeError::Torch("x".into()).into()] {
            assert!(!is_wrong_use(&error), "{error}");
        }
    }

    #[test]
    fn a_panic_of_libtorch_becomes_its_first_line() {
        let panic = catch_unwind(|| tch::Tensor::from_slice(&[1.0, 2.0]).view([3])).unwrap_err();
        assert_eq!(panic_line(panic.as_ref()), "libtorch: shape '[3]' is invalid for input of size 2");
        let quoted =
            r#"called `Result::unwrap()` on an `Err` value: Torch("not \"so\"\nframe #0")"#.to_owned();
        assert_eq!(panic_line(&quoted), "libtorch: not \"so\"");
        let short = "called `Result::unwrap()` on an `Err` value: Torch(\"bad shape\")".to_owned();
        assert_eq!(panic_line(&short), "libtorch: bad shape");
    }

    #[test]
    fn any_other_panic_is_an_internal_error() {
        assert_eq!(panic_line(&"index out of bounds\nmore"), "internal error: index out of bounds");
        assert_eq!(panic_line(&7), "internal error: no message");
    }
}
