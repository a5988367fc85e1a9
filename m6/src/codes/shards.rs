//! Writes shards again with the codes of their pictures beside them.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use m6_data::{DataError, Flaw, ShardFile, ShardSet, SkipCounts, SkipLog, Skipped, shard_names};
use m6_run::{fetching, write_atomic};
use m6_vqgan::Vqgan;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tch::Device;

use super::{CodeMember, Views};
use crate::error::{Error, Result};

/// Beside the new shards: what their codes were made from.
const RECIPE: &str = "codes.json";
/// Beside them, too: what was wrong with their samples.
const SKIPPED: &str = "skipped.jsonl";

/// What [`write_code_shards`] is to write.
#[derive(Debug)]
pub struct CodeShards<'a> {
    /// Files, globs, urls or brace lists; each shard must have a file name of its own.
    pub shards: &'a [String],
    /// What is encoded.
    pub views: Views,
    /// Folder of the new shards, which have the names of the old without `.gz`.
    pub out: &'a Path,
}

/// What [`write_code_shards`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CodesReport {
    /// The new member's extension.
    pub member: String,
    /// The shards, in order.
    pub shards: Vec<PathBuf>,
    /// Shards among them that were there already.
    pub kept: usize,
    /// Samples in the shards that were written.
    pub samples: usize,
    /// Samples among them that got codes.
    pub with_codes: usize,
    /// Samples that were left out, since their names cannot be written or they could not be read.
    pub left_out: usize,
    /// Shards that could not be used, and why.
    pub unusable: Vec<Flaw>,
}

/// Writes each shard into a folder again, each sample with all its members and, where it has a picture that can be read,
/// the codes of its views ([`CodeMember`]). A shard that is there already is left as it is, so that the work can be
/// stopped and started again, and be shared out by shards. Crops depend on the seed and the shard's name only. Samples and
/// pictures that cannot be used are logged in the folder's `skipped.jsonl`, and so are shards.
///
/// # Errors
/// When the folder holds shards or codes of another recipe, shards cannot be written, or too many samples cannot be used.
pub fn write_code_shards(request: &CodeShards, vqgan: &Vqgan, device: Device) -> Result<CodesReport> {
    let CodeShards { shards, views, out } = request;
    views.check("--transform", vqgan)?;
    let member = CodeMember::of(vqgan)?;
    let names = shard_names(shards)?;
    let targets = targets(&names, out)?;
    keep_recipe(&out.join(RECIPE), views, vqgan)?;
    let mut report = CodesReport { member: member.extension().to_owned(), ..CodesReport::default() };
    let mut shards = Vec::new();
    let log = SkipLog::new(&out.join(SKIPPED));
    let mut skipped = Skipped::new(views.skip, SkipCounts::default());
    for (number, (name, target)) in (1..).zip(names.iter().zip(&targets)) {
        if target.exists() {
            report.kept += 1;
            shards.push(target.clone());
            continue;
        }
        let set = match ShardSet::open_with(std::slice::from_ref(name), views.skip, fetching()) {
            Ok(set) => Arc::new(set),
            Err(error) => {
                report.unusable.push(Flaw::of_unusable(name.into(), &error));
                continue;
            }
        };
        log.add_known(set.flaws(), |note| eprintln!("{note}"))?;
        let file_name = target.file_name().unwrap_or_default().to_string_lossy();
        let title = format!("encode {file_name} ({number} of {})", names.len());
        let views = Views { seed: seed_of(views.seed, &file_name), ..views.clone() };
        let mut file = ShardFile::create_in(out)?;
        let mut next = 0;
        let mut left_out = Vec::new();
        views.encode(&set, vqgan, device, &title, (&mut skipped, Some(&log)), |index, codes| {
            let codes = codes.map(|codes| member.write(&codes)).transpose()?;
            left_out.extend(copy(&set, next..index, &mut file)?);
            next = index + 1;
            let has_codes = codes.is_some();
            let unusable = write(&set, index, codes.map(|codes| (member.extension(), codes)), &mut file)?;
            report.with_codes += usize::from(has_codes && unusable.is_none());
            left_out.extend(unusable);
            Ok(())
        })?;
        left_out.extend(copy(&set, next..set.len(), &mut file)?);
        report.left_out += left_out.len();
        report.samples += set.len() - left_out.len();
        log.add_known(&left_out, |note| eprintln!("left out: {note}"))?;
        file.finish(target)?;
        shards.push(target.clone());
    }
    log.add_known(&report.unusable, |note| eprintln!("{note}"))?;
    report.shards = shards;
    Ok(report)
}

/// Where each shard goes.
fn targets(names: &[String], out: &Path) -> Result<Vec<PathBuf>> {
    let mut seen = HashSet::new();
    let target = |name: &String| {
        let path = match name.contains("://") {
            // A signed url has its signature behind the name.
            true => Path::new(name.split(['?', '#']).next().unwrap_or(name)),
            false => Path::new(name),
        };
        let file_name = path.file_name().filter(|_| !name.starts_with("pipe:"));
        let target = file_name.map(|file_name| out.join(as_archive(file_name))).ok_or_else(|| {
            Error::Usage(format!("{name}: expected a file or url, after whose name the new shard is named"))
        })?;
        if !seen.insert(target.clone()) {
            return Err(Error::Usage(format!("{name}: an earlier shard has the same file name")));
        }
        let same = |target: &Path| target.canonicalize().ok().zip(path.canonicalize().ok());
        if same(&target).is_some_and(|(new, old)| new == old) {
            return Err(Error::Usage(format!("{name}: is in the folder of the new shards; choose another")));
        }
        Ok(target)
    };
    names.iter().map(target).collect()
}

/// The name of a shard as it is written, an archive that is not compressed, whatever it was read from.
fn as_archive(file_name: &OsStr) -> PathBuf {
    let extension = |name: &Path| name.extension().and_then(OsStr::to_str).map(str::to_lowercase);
    let mut name = PathBuf::from(file_name);
    if extension(&name).is_some_and(|found| ["gz", "bz2", "xz"].contains(&found.as_str())) {
        name.set_extension("");
    }
    // By the names of texts it would be read as lines.
    if extension(&name).is_some_and(|found| ["tgz", "txt", "jsonl"].contains(&found.as_str())) {
        name.set_extension("tar");
    }
    name
}

/// Writes down by what the codes are made, or checks that those there were made by the same.
fn keep_recipe(path: &Path, views: &Views, vqgan: &Vqgan) -> Result<()> {
    let recipe = Map::from_iter([
        ("vqgan".to_owned(), json!(vqgan.hash())),
        ("transform".to_owned(), json!(views.transform)),
        ("views".to_owned(), json!(views.count)),
        ("seed".to_owned(), json!(views.seed)),
    ]);
    if !path.exists() {
        let json = serde_json::to_vec_pretty(&recipe).map_err(|error| Error::file(path, error))?;
        return Ok(write_atomic(path, &json)?);
    }
    let text = fs::read_to_string(path).map_err(|error| Error::file(path, error))?;
    let there: Map<String, Value> = serde_json::from_str(&text).map_err(|error| Error::file(path, error))?;
    match recipe.iter().find(|(key, value)| there.get(*key) != Some(value)) {
        Some((key, value)) => {
            let found = there.get(key).unwrap_or(&Value::Null);
            let path = path.display();
            Err(Error::Usage(format!(
                "{path}: its folder has codes of {key} = {found}; {value} needs another"
            )))
        }
        None => Ok(()),
    }
}

/// Shards of one set get crops that differ.
fn seed_of(seed: u64, file_name: &str) -> u64 {
    let hash = blake3::hash(file_name.as_bytes());
    let (bytes, _) = hash.as_bytes().as_chunks::<8>();
    seed ^ u64::from_le_bytes(bytes[0])
}

/// As [`write()`], without new members.
fn copy(set: &ShardSet, indices: std::ops::Range<usize>, file: &mut ShardFile) -> Result<Vec<Flaw>> {
    indices.filter_map(|index| write(set, index, None, file).transpose()).collect()
}

/// Writes a sample again, or says why it cannot be; a member of the extension of the new one gives way to it.
fn write(
    set: &ShardSet,
    index: usize,
    new: Option<(&str, Vec<u8>)>,
    file: &mut ShardFile,
) -> Result<Option<Flaw>> {
    if let Some(flaw) = set.unsafe_name(index) {
        return Ok(Some(flaw));
    }
    let sample = match set.sample(index) {
        Ok(sample) => sample,
        Err(DataError::Sample(flaw)) => return Ok(Some(flaw)),
        Err(error) => return Err(error.into()),
    };
    let new = new.as_ref().map(|(extension, bytes)| (*extension, bytes.as_slice()));
    let old = sample.members().filter(|(extension, _)| new.is_none_or(|(new, _)| new != *extension));
    let members: Vec<(&str, &[u8])> = old.chain(new).collect();
    file.write(sample.key, &members)?;
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_named_after_those_they_come_from_and_are_archives() {
        let targets = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            targets(&names, Path::new("out")).map_err(|error| error.to_string())
        };
        let found = targets(&["a/x.tar", "a/y.tar.gz", "https://host/z.tgz?at=a/b.tar"]).unwrap();
        assert_eq!(found, ["out/x.tar", "out/y.tar", "out/z.tar"].map(PathBuf::from));
        let found = targets(&["a/words.txt", "a/lines.JSONL.gz", "a/y.txt.xz", "a/z.tar.bz2"]).unwrap();
        assert_eq!(found, ["out/words.tar", "out/lines.tar", "out/y.tar", "out/z.tar"].map(PathBuf::from));
        let same = targets(&["a/x.tar", "b/x.tar.gz"]).unwrap_err();
        assert!(same.contains("an earlier shard has the same file name"), "{same}");
    }
}
