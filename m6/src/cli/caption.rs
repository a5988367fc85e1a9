//! `m6 caption`.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use m6::Result;
use m6::generate::{Caption, caption};
use m6::model::{Language, Model};
use m6_data::Rgb8;
use m6_run::Task;
use m6_runtime::device::device;
use serde::Serialize;

use super::output;

/// Pictures that are read and captioned together.
const BATCH: usize = 16;

/// Write captions of pictures in English and Chinese
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  m6 caption --model models/emoji --lang zh heart.png cat.jpg")]
pub struct Args {
    /// JPEG, PNG, WebP or BMP files
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// Model folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Language of the captions; both if not given
    #[arg(long)]
    lang: Option<Lang>,
    /// Texts that are followed at once: 1 is greedy, more find better captions and take longer
    #[arg(long, default_value_t = 4)]
    beams: usize,
    /// Where to compute: `cpu`, `cuda:N`, or `auto`
    #[arg(long, default_value = "auto")]
    device: String,
    /// Print one line of JSON for each image and language, with all captions found
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Lang {
    Zh,
    En,
}

impl From<Lang> for Language {
    fn from(lang: Lang) -> Self {
        match lang {
            Lang::Zh => Self::Zh,
            Lang::En => Self::En,
        }
    }
}

/// A line of `--json`.
#[derive(Debug, Serialize)]
struct Line<'a> {
    image: &'a Path,
    lang: Language,
    captions: Vec<Scored<'a>>,
}

#[derive(Debug, Serialize)]
struct Scored<'a> {
    text: &'a str,
    logprob: f64,
}

impl Args {
    /// Captions every image that can be read; the others are named, and the command fails in the end.
    pub fn run(self) -> Result<()> {
        let model = Model::load(&self.model, device(&self.device)?)?;
        let max_tokens = model.info.model.max_text as usize;
        let mut task = Task::new("caption", self.images.len() as u64, "images");
        let mut unread = 0;
        for images in self.images.chunks(BATCH) {
            let (mut read, mut pictures) = (Vec::new(), Vec::new());
            for image in images {
                match read_picture(image) {
                    Ok(picture) => {
                        read.push(image);
                        pictures.push(picture);
                    }
                    Err(error) => {
                        unread += 1;
                        eprintln!("m6: {error}");
                    }
                }
            }
            let captions = caption(&model, &pictures, self.lang.map(Language::from), self.beams, max_tokens)?;
            for (image, captions) in read.into_iter().zip(&captions) {
                self.print(image, captions)?;
            }
            task.advance(images.len() as u64);
        }
        task.finish();
        match unread {
            0 => Ok(()),
            _ => Err(output::file_error(
                Path::new("caption"),
                format_args!("{unread} of {} images could not be read", self.images.len()),
            )),
        }
    }

    /// Prints the captions of an image, which come language by language.
    fn print(&self, image: &Path, captions: &[Caption]) -> Result<()> {
        for captions in captions.chunk_by(|a, b| a.language == b.language) {
            if self.json {
                let scored =
                    captions.iter().map(|caption| Scored { text: &caption.text, logprob: caption.logprob });
                output::json(&Line { image, lang: captions[0].language, captions: scored.collect() })?;
            } else {
                output::line(format_args!("{}  {}", image.display(), captions[0].text))?;
            }
        }
        Ok(())
    }
}

fn read_picture(path: &Path) -> Result<Rgb8> {
    let bytes = std::fs::read(path).map_err(|error| output::file_error(path, error))?;
    Rgb8::decode(&bytes).map_err(|error| output::file_error(path, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unreadable_pictures_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.png");
        assert!(read_picture(&path).unwrap_err().to_string().contains("a.png: No such file"));
        std::fs::write(&path, "no picture").unwrap();
        let message = read_picture(&path).unwrap_err().to_string();
        assert!(message.contains("a.png: broken picture"), "{message}");
    }

    #[test]
    fn the_line_has_the_promised_keys() {
        let captions = vec![Scored { text: "红心", logprob: -0.5 }];
        let line = Line { image: Path::new("a.png"), lang: Language::Zh, captions };
        let expected = r#"{"image":"a.png","lang":"zh","captions":[{"text":"红心","logprob":-0.5}]}"#;
        assert_eq!(serde_json::to_string(&line).unwrap(), expected);
    }
}
