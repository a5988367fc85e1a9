//! Any text as a transform: what parses prints as something that parses to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use m6_data::Transform;

fuzz_target!(|spec: &str| {
    if let Ok(transform) = spec.parse::<Transform>() {
        let printed = String::from(transform.clone());
        assert_eq!(printed.parse::<Transform>().expect("what was printed"), transform);
    }
});
