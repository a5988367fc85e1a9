//! Any bytes as a picture: an error or a picture of as many pixels as it says.
#![no_main]

use libfuzzer_sys::fuzz_target;
use m6_data::Rgb8;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(picture) = Rgb8::decode(bytes) {
        assert_eq!(picture.pixels.len() as u64, 3 * u64::from(picture.width) * u64::from(picture.height));
    }
});
