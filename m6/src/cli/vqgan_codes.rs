//! `m6 vqgan encode` and `m6 vqgan decode`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use m6::{Error, Result};
use m6_data::{Rgb8, files_in, pictures_in};
use m6_run::{Task, write_atomic};
use m6_runtime::device::device;
use m6_vqgan::{CodeGrid, Vqgan};
use serde::Serialize;

use super::output;

/// Operations of tiles are shown in billions.
const GIGA: u64 = 1_000_000_000;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  m6 vqgan encode models/emoji/vqgan pictures -o codes --reconstructions seen\n\n\
    pictures/a/cat.jpg becomes codes/a/cat.npy: [rows, columns] of int64, for numpy.load. Pictures keep their size. One \
    whose sides are no multiples of the pixels of a code is continued to the right and below by its mirror image; its \
    reconstruction is cut back to its size. What is too large for one pass is computed in tiles, without seams: the codes \
    are those of the whole."
)]
pub struct EncodeArgs {
    /// Folder of the tokenizer
    dir: PathBuf,
    /// JPEG, PNG, WebP or BMP files, or folders with such
    #[arg(required = true)]
    pictures: Vec<PathBuf>,
    /// Folder for the codes
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Also write what the codes keep of each picture, as PNGs
    #[arg(long, value_name = "DIR")]
    reconstructions: Option<PathBuf>,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  m6 vqgan decode models/emoji/vqgan codes -o pictures\n\n\
    codes/a/cat.npy becomes pictures/a/cat.png. Integers of any width are read, as [rows, columns]. Codes do not tell the \
    size of their picture: where it was no multiple of the pixels of a code, the decoded one is larger by the mirrored rest.\n\
    What is too large for one pass is computed in tiles, without seams: the picture is that of the whole.")]
pub struct DecodeArgs {
    /// Folder of the tokenizer
    dir: PathBuf,
    /// Code files (*.npy), or folders with such
    #[arg(required = true)]
    codes: Vec<PathBuf>,
    /// Folder for the pictures
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, clap::Args)]
struct CommonArgs {
    /// Replace files that are there already
    #[arg(long)]
    overwrite: bool,
    /// Where to compute: `cpu`, `cuda:N`, or `auto`
    #[arg(long, default_value = "auto")]
    device: String,
    /// Print one line of JSON for each file
    #[arg(long)]
    json: bool,
}

/// A line of `--json`.
#[derive(Debug, Serialize)]
struct Line<'a> {
    picture: &'a Path,
    codes: &'a Path,
    width: u32,
    height: u32,
    rows: usize,
    columns: usize,
}

impl EncodeArgs {
    pub fn run(self) -> Result<()> {
        let jobs = jobs(&self.pictures, pictures_in)?;
        let codes = targets(&jobs, &self.out, "npy", self.common.overwrite)?;
        let seen = self.reconstructions.as_ref();
        let seen = seen.map(|dir| targets(&jobs, dir, "png", self.common.overwrite)).transpose()?;
        let model = Vqgan::load(&self.dir, device(&self.common.device)?)?;
        let is_single = jobs.len() == 1;
        self.common.for_each(&jobs, "encode", "pictures", |index| {
            let (picture, grid) = encode(&model, &jobs[index].source, tiles("encode", is_single))?;
            if let Some(targets) = &seen {
                let padded = model.decode_picture(&grid, tiles("decode", is_single))?;
                make_folder(&targets[index])?;
                padded.crop(0, 0, picture.width, picture.height)?.save_png(&targets[index])?;
            }
            make_folder(&codes[index])?;
            write_atomic(&codes[index], &grid.to_npy()?)?;
            self.common.print(&jobs[index].source, &codes[index], &picture, &grid, &codes[index])
        })
    }
}

/// Reads a picture; an error names its file.
fn encode(model: &Vqgan, path: &Path, advance: impl FnMut(u64, u64)) -> Result<(Rgb8, CodeGrid)> {
    let bytes = fs::read(path).map_err(|error| output::file_error(path, error))?;
    let picture = Rgb8::decode(&bytes).map_err(|error| output::file_error(path, error))?;
    let grid = model.encode_picture(&picture, advance).map_err(|error| output::file_error(path, error))?;
    Ok((picture, grid))
}

impl DecodeArgs {
    pub fn run(self) -> Result<()> {
        let jobs = jobs(&self.codes, |folder| files_in(folder, &["npy"]))?;
        let pictures = targets(&jobs, &self.out, "png", self.common.overwrite)?;
        let model = Vqgan::load(&self.dir, device(&self.common.device)?)?;
        let is_single = jobs.len() == 1;
        self.common.for_each(&jobs, "decode", "code files", |index| {
            let (picture, grid) = decode(&model, &jobs[index].source, tiles("decode", is_single))?;
            make_folder(&pictures[index])?;
            picture.save_png(&pictures[index])?;
            self.common.print(&pictures[index], &jobs[index].source, &picture, &grid, &pictures[index])
        })
    }
}

/// Reads a code file; an error names it.
fn decode(model: &Vqgan, path: &Path, advance: impl FnMut(u64, u64)) -> Result<(Rgb8, CodeGrid)> {
    let bytes = fs::read(path).map_err(|error| output::file_error(path, error))?;
    let grid = CodeGrid::from_npy(&bytes).map_err(|error| output::file_error(path, error))?;
    let picture = model.decode_picture(&grid, advance).map_err(|error| output::file_error(path, error))?;
    Ok((picture, grid))
}

/// Shows how much of a large picture is done, if it is the only one: of several the pictures are counted.
fn tiles(verb: &str, is_shown: bool) -> impl FnMut(u64, u64) {
    let mut task = None;
    let mut done = 0;
    move |operations, all| {
        if is_shown {
            let before = done / GIGA;
            done += operations;
            task.get_or_insert_with(|| Task::new(verb, all / GIGA, "GFLOP")).advance(done / GIGA - before);
        }
    }
}

impl CommonArgs {
    /// Does `work` for every job. A single one that fails ends the command; of several the failed are named, and the
    /// command fails in the end.
    fn for_each(
        &self,
        jobs: &[Job],
        verb: &str,
        unit: &'static str,
        mut work: impl FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        if jobs.len() == 1 {
            return work(0);
        }
        let mut task = Task::new(verb, jobs.len() as u64, unit);
        let mut failed = 0;
        for index in 0..jobs.len() {
            if let Err(error) = work(index) {
                failed += 1;
                eprintln!("m6: {error}");
            }
            task.advance(1);
        }
        task.finish();
        match failed {
            0 => Ok(()),
            _ => Err(output::file_error(
                Path::new(verb),
                format_args!("{failed} of {} {unit} could not be used", jobs.len()),
            )),
        }
    }

    fn print(&self, picture: &Path, codes: &Path, size: &Rgb8, grid: &CodeGrid, made: &Path) -> Result<()> {
        let (&Rgb8 { width, height, .. }, &CodeGrid { rows, columns, .. }) = (size, grid);
        if self.json {
            return output::json(&Line { picture, codes, width, height, rows, columns });
        }
        output::line(format_args!("{}  {width}x{height} pixels, {columns}x{rows} codes", made.display()))
    }
}

/// A file to read, and the name of what is made of it, without extension, inside of the output folder.
#[derive(Debug)]
struct Job {
    source: PathBuf,
    name: PathBuf,
}

/// The files that `inputs` are, or that `list` finds in them where they are folders.
fn jobs(inputs: &[PathBuf], list: impl Fn(&Path) -> m6_data::Result<Vec<PathBuf>>) -> Result<Vec<Job>> {
    let mut jobs: Vec<Job> = Vec::new();
    for input in inputs {
        if !input.is_dir() {
            let name = PathBuf::from(input.file_stem().unwrap_or_default());
            jobs.push(Job { source: input.clone(), name });
            continue;
        }
        let found = list(input)?;
        if found.is_empty() {
            return Err(output::file_error(input, "holds none of the files that are read"));
        }
        jobs.extend(found.into_iter().map(|source| {
            let name = source.strip_prefix(input).unwrap_or(&source).with_extension("");
            Job { source, name }
        }));
    }
    Ok(jobs)
}

/// Where the results of `jobs` go: every name is another, and no file is there unless it may be replaced.
fn targets(jobs: &[Job], out: &Path, extension: &str, overwrite: bool) -> Result<Vec<PathBuf>> {
    let mut sources = BTreeMap::new();
    let mut targets = Vec::with_capacity(jobs.len());
    for Job { source, name } in jobs {
        let mut file = out.join(name).into_os_string();
        file.push(".");
        file.push(extension);
        let target = PathBuf::from(file);
        if let Some(other) = sources.insert(target.clone(), source) {
            let (target, other, source) = (target.display(), other.display(), source.display());
            return Err(Error::Usage(format!("{target}: would be made of both {other} and {source}")));
        }
        if !overwrite && target.exists() {
            return Err(Error::Usage(format!(
                "{}: is there already; --overwrite replaces it",
                target.display()
            )));
        }
        targets.push(target);
    }
    output::check_writable(&out.join("probe"))?;
    Ok(targets)
}

fn make_folder(file: &Path) -> Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(|error| output::file_error(folder, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(source: &str, name: &str) -> Job {
        Job { source: source.into(), name: name.into() }
    }

    #[test]
    fn names_follow_from_the_inputs() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        for name in ["a/cat.v1.jpg", "dog.png", ".hidden.png", "notes.txt"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let jobs = jobs(&[dir.path().to_owned(), "x/bird.webp".into()], pictures_in).unwrap();
        let targets = targets(&jobs, dir.path(), "npy", false).unwrap();
        let expected = ["a/cat.v1.npy", "dog.npy", "bird.npy"].map(|name| dir.path().join(name));
        assert_eq!(targets, expected);
        let empty = tempfile::tempdir().unwrap();
        let message = super::jobs(&[empty.path().to_owned()], pictures_in).unwrap_err().to_string();
        assert!(message.ends_with("holds none of the files that are read"), "{message}");
    }

    #[test]
    fn nothing_is_replaced_unasked() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = [job("a/cat.png", "cat")];
        fs::write(dir.path().join("cat.npy"), "old").unwrap();
        let message = targets(&jobs, dir.path(), "npy", false).unwrap_err().to_string();
        assert!(message.ends_with("cat.npy: is there already; --overwrite replaces it"), "{message}");
        targets(&jobs, dir.path(), "npy", true).unwrap();
        let twice = [job("a/dog.png", "dog"), job("b/dog.jpg", "dog")];
        let message = targets(&twice, dir.path(), "npy", true).unwrap_err().to_string();
        assert!(message.ends_with("dog.npy: would be made of both a/dog.png and b/dog.jpg"), "{message}");
    }
}
