//! What several tests need.

#[cfg(feature = "remote")]
pub use server::{Answer, Server};

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::picture::Rgb8;
use crate::writer::ShardWriter;

/// Extensions and bytes of a sample.
pub type Members<'a> = &'a [(&'a str, &'a [u8])];

/// A shard of these keys and members.
pub fn shard(dir: &Path, samples: &[(&str, Members)]) -> PathBuf {
    let mut writer = ShardWriter::create(dir, "test", u64::MAX).unwrap();
    for (key, members) in samples {
        writer.write(key, members).unwrap();
    }
    writer.finish().unwrap().remove(0)
}

/// A tar file with exactly these members, whatever their names.
pub fn archive(path: &Path, members: &[(&str, &[u8])]) {
    let mut builder = tar::Builder::new(File::create(path).unwrap());
    for (name, bytes) in members {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(bytes.len() as u64);
        header.set_cksum();
        builder.append(&header, *bytes).unwrap();
    }
    builder.finish().unwrap();
}

/// The pattern of a command that writes `file`.
pub fn cat(file: &Path) -> String {
    format!("pipe:cat '{}'", file.display())
}

#[cfg(feature = "remote")]
mod server {
    use std::io::{BufRead, BufReader, Write};
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::sync::{Arc, Mutex};

    /// What a [`Server`] does about a path.
    #[derive(Clone)]
    pub enum Answer {
        Whole(Vec<u8>),
        /// All but the last byte, then the end.
        Cut(Vec<u8>),
        /// All but the last byte, then nothing.
        Stall(Vec<u8>),
        /// Nothing at all.
        Silence,
    }

    /// Serves files on this machine, one connection at a time, for as long as the test's process lives.
    pub struct Server {
        address: SocketAddr,
        requests: Arc<Mutex<Vec<String>>>,
    }

    impl Server {
        /// Other paths than these are not found.
        pub fn start(answers: &[(&str, Answer)]) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let requests = Arc::<Mutex<Vec<String>>>::default();
            let (answers, seen) = (
                answers.iter().map(|(p, a)| (p.to_string(), a.clone())).collect::<Vec<_>>(),
                requests.clone(),
            );
            std::thread::spawn(move || {
                let mut held = Vec::new();
                for stream in listener.incoming() {
                    held.extend(serve(stream.unwrap(), &answers, &seen));
                }
            });
            Self { address, requests }
        }

        pub fn url(&self, path: &str) -> String {
            format!("http://{}{path}", self.address)
        }

        /// The paths that were asked for.
        pub fn requests(&self) -> Vec<String> {
            self.requests.lock().unwrap().clone()
        }
    }

    /// Gives back a connection that is to stay open.
    fn serve(
        mut stream: TcpStream,
        answers: &[(String, Answer)],
        seen: &Mutex<Vec<String>>,
    ) -> Option<TcpStream> {
        let lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
        let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
        let path = head.first()?.split(' ').nth(1)?.to_owned();
        let answer = answers.iter().find(|(known, _)| *known == path).map(|(_, answer)| answer);
        let tagged = path.starts_with("/bucket/");
        seen.lock().unwrap().push(path);
        let (status, body, sent) = match answer {
            None => ("404 Not Found", b"no\nsuch file".as_slice(), 12),
            Some(Answer::Silence) => return Some(stream),
            Some(Answer::Whole(body)) => ("200 OK", body.as_slice(), body.len()),
            Some(Answer::Cut(body) | Answer::Stall(body)) => ("200 OK", body.as_slice(), body.len() - 1),
        };
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n", body.len());
        // As S3 sends them; with a tag, a body that breaks off would be asked for again from there on.
        let tags = "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\nETag: \"1\"\r\n";
        let tags = if tagged { tags } else { "" };
        stream.write_all(&[head.as_bytes(), tags.as_bytes(), b"\r\n", &body[..sent]].concat()).ok()?;
        matches!(answer, Some(Answer::Stall(_))).then_some(stream)
    }
}

/// A picture in which no two pixels that are near each other are the same.
pub fn gradient(width: u32, height: u32) -> Rgb8 {
    let pixels = (0..width * height * 3).map(|i| (i % 251) as u8).collect();
    Rgb8 { width, height, pixels }
}
