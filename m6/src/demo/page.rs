//! The demo's page: one HTML file with the pictures beside it and nothing from the network.

use std::fmt::Write;
use std::path::PathBuf;

use crate::eval::{ByLanguage, Judged};
use crate::model::Language;

const STYLE: &str = include_str!("style.css");

/// Everything that the page shows. Files are relative to the page.
#[derive(Debug)]
pub(super) struct Page {
    /// Folder of the finished model.
    pub model: PathBuf,
    pub pretraining: Pretraining,
    pub drawings: Vec<DrawnPrompt>,
    pub captioned: Vec<Captioned>,
    pub timings: Vec<Timing>,
}

/// What came of pretraining from scratch.
#[derive(Debug)]
pub(super) struct Pretraining {
    pub curves: Vec<Curve>,
    /// Of the tokenizer's reconstructions of held-out pictures, in decibels.
    pub psnr: f64,
    /// Held-out pictures above their reconstructions.
    pub reconstructions: String,
    /// What the tiny transformer draws at its end.
    pub samples: String,
}

/// A loss curve.
#[derive(Debug)]
pub(super) struct Curve {
    pub svg: String,
    /// First and last value of each loss.
    pub fall: String,
}

/// A strip of pictures of one prompt.
#[derive(Debug)]
pub(super) struct DrawnPrompt {
    pub prompt: String,
    pub file: String,
}

/// Captions of a held-out split.
#[derive(Debug)]
pub(super) struct Captioned {
    /// What is new in this split.
    pub note: String,
    pub cards: Vec<Card>,
}

/// A picture with its names and captions.
#[derive(Debug)]
pub(super) struct Card {
    pub file: String,
    pub style: Option<String>,
    pub judged: ByLanguage<Option<Judged>>,
}

/// How long a stage took.
#[derive(Debug)]
pub(super) struct Timing {
    pub what: String,
    pub amount: String,
    pub seconds: f64,
}

impl Page {
    /// The page as HTML.
    pub fn to_html(&self) -> String {
        let sections =
            [self.pretraining.to_html(), self.drawings(), self.captions(), self.timings()].concat();
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>m6 demo</title>\n\
             <style>\n{STYLE}</style>\n</head>\n<body>\n<h1>m6: one transformer that reads, sees, writes and draws</h1>\n\
             <p>This page was made on this machine by <code>m6 demo</code>. It pretrained a tiny model from nothing, \
             then let a finished one, <code>{}</code>, draw prompts and name pictures that it never saw.</p>\n\
             {sections}</body>\n</html>\n",
            escape(&self.model.display().to_string())
        )
    }

    fn drawings(&self) -> String {
        let mut html = "<h2>Drawing from words</h2>\n<p>The finished model turns a prompt in English or Chinese into \
                        codes, one at a time, and its image tokenizer decodes them. Nothing is picked by hand: these are \
                        the first pictures of each prompt.</p>\n<div class=\"drawn\">\n"
            .to_owned();
        for DrawnPrompt { prompt, file } in &self.drawings {
            html += &figure(file, prompt, prompt);
        }
        html + "</div>\n"
    }

    fn captions(&self) -> String {
        let mut html = "<h2>Naming pictures</h2>\n<p>Held-out pictures, with the model's own captions in both languages. A \
                        tick means that the caption is the true name; else the true name is struck through behind it.\
                        </p>\n"
            .to_owned();
        for Captioned { note, cards } in &self.captioned {
            let _ = writeln!(html, "<p>{}{}</p>\n<div class=\"cards\">", escape(note), right_share(cards));
            for card in cards {
                html += &card.to_html();
            }
            html += "</div>\n";
        }
        html
    }

    fn timings(&self) -> String {
        let mut html = "<h2>What it took</h2>\n<table>\n<tr><th>Stage<th>Amount<th>Seconds</tr>\n".to_owned();
        let row = |what: &str, amount: &str, seconds: f64| {
            let (what, amount) = (escape(what), escape(amount));
            format!("<tr><td>{what}<td>{amount}<td class=\"number\">{seconds:.1}</tr>\n")
        };
        for Timing { what, amount, seconds } in &self.timings {
            html += &row(what, amount, *seconds);
        }
        html += &row("in all", "", self.timings.iter().map(|timing| timing.seconds).sum());
        html + "</table>\n"
    }
}

impl Pretraining {
    fn to_html(&self) -> String {
        let mut html = "<h2>Pretraining from nothing</h2>\n<p>Two small models were trained just now on the emoji of the \
                        repository: an image tokenizer that turns pictures into codes, and a transformer that learns five \
                        tasks on texts, pictures and codes at once. Two minutes are enough to see the loss fall, not to \
                        draw well.</p>\n<div class=\"pair\">\n"
            .to_owned();
        for Curve { svg, fall } in &self.curves {
            // The chart is made by this program and escapes its own texts.
            let _ = writeln!(html, "<figure>\n{svg}<figcaption>{}</figcaption>\n</figure>", escape(fall));
        }
        html += "</div>\n<div class=\"pair small\">\n";
        let caption = format!(
            "Held-out pictures (above) and what the tiny tokenizer makes of their codes (below): PSNR {:.1} dB on all of them.",
            self.psnr
        );
        html += &figure(&self.reconstructions, "reconstructions", &caption);
        html +=
            &figure(&self.samples, "first drawings", "What the tiny transformer draws after this training.");
        html + "</div>\n"
    }
}

impl Card {
    fn to_html(&self) -> String {
        let alt =
            self.judged.en.as_ref().or(self.judged.zh.as_ref()).map_or("", |judged| judged.truth.as_str());
        let mut lines = String::new();
        for language in [Language::En, Language::Zh] {
            let Some(judged) = self.judged.get(language) else { continue };
            let (caption, truth) = (escape(&judged.caption), escape(&judged.truth));
            let _ = match judged.exact {
                true => writeln!(lines, "<div class=\"right\">{caption}</div>"),
                false => writeln!(lines, "<div class=\"wrong\">{caption} <s>{truth}</s></div>"),
            };
        }
        if let Some(style) = &self.style {
            let _ = writeln!(lines, "<div class=\"style\">{}</div>", escape(style));
        }
        figure_with(&self.file, alt, &lines)
    }
}

/// How many captions are right, in words.
fn right_share(cards: &[Card]) -> String {
    let share = |language: Language| {
        let judged: Vec<&Judged> =
            cards.iter().filter_map(|card| card.judged.get(language).as_ref()).collect();
        (judged.iter().filter(|judged| judged.exact).count(), judged.len())
    };
    let ((en, en_all), (zh, zh_all)) = (share(Language::En), share(Language::Zh));
    format!(" Right: {en} of {en_all} in English, {zh} of {zh_all} in Chinese.")
}

/// A picture with plain text below it.
fn figure(file: &str, alt: &str, caption: &str) -> String {
    figure_with(file, alt, &escape(caption))
}

/// A picture with HTML below it.
fn figure_with(file: &str, alt: &str, caption_html: &str) -> String {
    let (file, alt) = (escape(file), escape(alt));
    format!("<figure><img src=\"{file}\" alt=\"{alt}\"><figcaption>{caption_html}</figcaption></figure>\n")
}

/// Text as HTML, also inside of a quoted attribute.
fn escape(text: &str) -> String {
    let mut html = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => html += "&amp;",
            '<' => html += "&lt;",
            '>' => html += "&gt;",
            '"' => html += "&quot;",
            '\'' => html += "&#39;",
            other => html.push(other),
        }
    }
    html
}

#[cfg(test)]
mod tests {
    use super::*;

    const NASTY: &str = "<script>\"&'";

    fn page() -> Page {
        let judged = |caption: &str, language| Some(Judged::new("red heart", caption, -1.0, language));
        let nasty = || NASTY.to_owned();
        Page {
            model: NASTY.into(),
            pretraining: Pretraining {
                curves: vec![Curve { svg: "<svg>chart</svg>".to_owned(), fall: nasty() }],
                psnr: 21.26,
                reconstructions: "a/recon.png".to_owned(),
                samples: "a/samples.png".to_owned(),
            },
            drawings: vec![DrawnPrompt { prompt: nasty(), file: "pictures/drawn-00.png".to_owned() }],
            captioned: vec![Captioned {
                note: nasty(),
                cards: vec![Card {
                    file: nasty(),
                    style: Some(nasty()),
                    judged: ByLanguage {
                        en: judged("Red heart", Language::En),
                        zh: judged(NASTY, Language::Zh),
                    },
                }],
            }],
            timings: vec![
                Timing { what: nasty(), amount: nasty(), seconds: 1.25 },
                Timing { what: "draw".to_owned(), amount: String::new(), seconds: 2.5 },
            ],
        }
    }

    #[test]
    fn every_text_is_escaped() {
        let html = page().to_html();
        assert!(!html.contains("<script"));
        assert_eq!(html.matches("&lt;script&gt;&quot;&amp;&#39;").count(), 10);
    }

    #[test]
    fn everything_is_on_the_page_and_nothing_comes_from_elsewhere() {
        let html = page().to_html();
        for part in
            ["<svg>chart</svg>", "src=\"a/recon.png\"", "a/samples.png", "pictures/drawn-00.png", "21.3 dB"]
        {
            assert!(html.contains(part), "{part}");
        }
        assert!(html.contains("<div class=\"right\">Red heart</div>"));
        assert!(html.contains("Right: 1 of 1 in English, 0 of 1 in Chinese."));
        assert!(html.contains("<td>in all<td><td class=\"number\">3.8</tr>"), "{html}");
        assert!(!html.contains("http:") && !html.contains("https:") && !html.contains("url("));
    }
}
