//! Drawings side by side: a row for each prompt.

use m6_data::picture::Rgb8;
use m6_data::sheet::{LINE_HEIGHT, draw_text};

use super::drawing::Drawing;

/// Pixels between pictures and around them.
const GAP: u32 = 8;
const WHITE: [u8; 3] = [255; 3];
const INK: [u8; 3] = [32; 3];

/// A row of `count` drawings for each prompt, in the order of [`super::draw`], with the prompt above it; a prompt
/// longer than its row is cut off.
pub fn rows_grid(drawings: &[Drawing], count: usize) -> Rgb8 {
    let columns = count.clamp(1, drawings.len().max(1));
    let width = drawings.iter().map(|drawing| drawing.picture.width).max().unwrap_or(0);
    let height = drawings.iter().map(|drawing| drawing.picture.height).max().unwrap_or(0);
    let rows = drawings.len().div_ceil(columns) as u32;
    let row_height = LINE_HEIGHT + height + GAP;
    let mut sheet = Rgb8::filled(GAP + columns as u32 * (width + GAP), GAP + rows * row_height, WHITE);
    for (row, drawings) in (0..).zip(drawings.chunks(columns)) {
        let top = GAP + row * row_height;
        draw_text(&mut sheet, GAP, top, &drawings[0].prompt, INK);
        for (column, drawing) in (0..).zip(drawings) {
            sheet.paste(&drawing.picture, GAP + column * (width + GAP), top + LINE_HEIGHT);
        }
    }
    sheet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_for_each_prompt_with_the_prompt_above_it() {
        let drawing = |prompt: &str, shade| Drawing {
            prompt: prompt.to_owned(),
            seed: 0,
            codes: Vec::new(),
            picture: Rgb8::filled(10, 12, [shade; 3]),
        };
        let drawings = [drawing("红心", 10), drawing("红心", 20), drawing("", 30), drawing("", 40)];
        let sheet = rows_grid(&drawings, 2);
        let row = LINE_HEIGHT + 12 + GAP;
        assert_eq!((sheet.width, sheet.height), (GAP + 2 * (10 + GAP), GAP + 2 * row));
        let pixel = |x: u32, y: u32| sheet.pixels[((y * sheet.width + x) * 3) as usize];
        let corners = [(0, 0, 10), (1, 0, 20), (0, 1, 30), (1, 1, 40)];
        for (x, y, shade) in corners {
            assert_eq!(pixel(GAP + x * (10 + GAP), GAP + LINE_HEIGHT + y * row), shade);
        }
        let label = |y: u32| (0..sheet.width).flat_map(move |x| (0..LINE_HEIGHT).map(move |dy| (x, y + dy)));
        assert!(label(GAP).any(|(x, y)| pixel(x, y) == INK[0]));
        assert!(label(GAP + row).all(|(x, y)| pixel(x, y) == 255));
    }

    #[test]
    fn no_drawing_gives_an_empty_sheet() {
        assert_eq!(rows_grid(&[], 3).width, 2 * GAP);
    }
}
