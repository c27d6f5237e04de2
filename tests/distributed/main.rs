//! Several processes train as one does: through the program itself, over sockets always and under MPI where this build has it.
//!
//! MPI needs the feature `mpi` and `mpirun`. Where either is missing its tests say that they are skipped, or fail with
//! `VITMAE_REQUIRE_MPI=1`.

mod failures;
mod processes;
mod training;

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// How processes are started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// One process.
    Alone,
    /// `RANK`, `WORLD_SIZE` and the rest are set, as torchrun does.
    Sockets(usize),
    /// `mpirun`.
    Mpi(usize),
}

impl Way {
    /// MPI with two processes, if it is there.
    fn mpi() -> Option<Self> {
        let installed = Command::new("mpirun").arg("--version").output().is_ok_and(|ran| ran.status.success());
        let missing = match (cfg!(feature = "mpi"), installed) {
            (true, true) => return Some(Self::Mpi(2)),
            (false, _) => "this build lacks the feature `mpi`",
            (true, false) => "mpirun is not installed",
        };
        assert!(std::env::var_os("VITMAE_REQUIRE_MPI").is_none_or(|value| value != "1"), "{missing}");
        println!("skipped: {missing}");
        None
    }
}

/// Variables that decide how many processes there are.
const VARIABLES: [&str; 8] = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
];

/// A folder to work in, with a small model: 16 patches, width 32.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        let model = serde_json::json!({
            "model_type": "vit_mae", "image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "decoder_hidden_size": 16, "decoder_intermediate_size": 32,
            "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "layer_norm_eps": 1e-6,
        });
        fs::write(place.path("model.json"), model.to_string()).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts `vitmae pretrain` with these arguments.
    fn start(&self, way: Way, out: &str, arguments: &str) -> Running {
        self.start_each(way, out, &|_| arguments.to_owned())
    }

    /// The same with arguments for each process; under MPI all have those of process 0.
    fn start_each(&self, way: Way, out: &str, arguments: &dyn Fn(usize) -> String) -> Running {
        let program = env!("CARGO_BIN_EXE_vitmae");
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let command = |program: &str| {
            let mut command = Command::new(program);
            for variable in VARIABLES {
                command.env_remove(variable);
            }
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null());
            command
        };
        let commands = match way {
            Way::Alone => vec![command(program)],
            Way::Sockets(size) => (0..size)
                .map(|rank| {
                    let mut command = command(program);
                    command.env("RANK", rank.to_string()).env("WORLD_SIZE", size.to_string());
                    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
                    command
                })
                .collect(),
            Way::Mpi(size) => {
                let mut command = command("mpirun");
                command.args(["-n", &size.to_string(), "--oversubscribe", "--allow-run-as-root", "--bind-to", "none"]);
                // Containers often forbid it, and MPI then writes so.
                command.args(["--mca", "btl_vader_single_copy_mechanism", "none", program]);
                vec![command]
            }
        };
        let (out, model) = (self.path(out), self.path("model.json"));
        let processes = commands
            .into_iter()
            .enumerate()
            .map(|(rank, mut command)| {
                command
                    .args(["pretrain", "--threads", "1", "--device", "cpu", "--out"])
                    .arg(&out)
                    .arg("--model")
                    .arg(&model);
                command.args(arguments(rank).split_whitespace()).spawn().unwrap()
            })
            .collect();
        Running { processes, out, way }
    }

    fn run(&self, way: Way, out: &str, arguments: &str) -> Ran {
        self.start(way, out, arguments).wait()
    }
}

/// A job under way.
struct Running {
    processes: Vec<Child>,
    out: PathBuf,
    way: Way,
}

impl Running {
    fn wait(self) -> Ran {
        // All are read at once: none may block on a full pipe while another is waited for.
        let readers: Vec<_> = self
            .processes
            .into_iter()
            .map(|process| std::thread::spawn(move || process.wait_with_output().unwrap()))
            .collect();
        let mut ran = Ran { statuses: Vec::new(), out: String::new(), err: String::new(), folder: self.out };
        for reader in readers {
            let output = reader.join().unwrap();
            ran.statuses.push(output.status.code());
            ran.out += &String::from_utf8_lossy(&output.stdout);
            ran.err += &String::from_utf8_lossy(&output.stderr);
        }
        assert!(!ran.err.contains("panicked"), "{}", ran.err);
        ran
    }

    /// Waits until the run has done `steps`.
    fn wait_for_steps(&self, steps: usize) {
        let started = Instant::now();
        let done = || fs::read_to_string(self.out.join("metrics.jsonl")).unwrap_or_default().lines().count();
        while done() < steps {
            assert!(started.elapsed() < Duration::from_secs(60), "{} of {steps} steps after a minute", done());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The process of this rank.
    fn process(&self, rank: usize) -> u32 {
        if !matches!(self.way, Way::Mpi(_)) {
            return self.processes[rank].id();
        }
        let wanted = format!("OMPI_COMM_WORLD_RANK={rank}");
        let has = |path: PathBuf, word: &[u8]| {
            fs::read(path).is_ok_and(|bytes| bytes.split(|&byte| byte == 0).any(|part| part == word))
        };
        let found =
            fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
        let mut found = found.filter(|process| {
            let folder = Path::new("/proc").join(process.to_string());
            has(folder.join("environ"), wanted.as_bytes())
                && has(folder.join("cmdline"), self.out.as_os_str().as_encoded_bytes())
        });
        found.next().expect("a process of this rank")
    }

    fn signal(&self, rank: usize, signal: &str) {
        let process = self.process(rank).to_string();
        assert!(Command::new("kill").args([signal, &process]).status().unwrap().success());
    }
}

/// What a job did.
struct Ran {
    statuses: Vec<Option<i32>>,
    out: String,
    err: String,
    folder: PathBuf,
}

impl Ran {
    #[track_caller]
    fn succeeded(self) -> Self {
        assert!(
            self.statuses.iter().all(|status| *status == Some(0)),
            "{:?}\n{}\n{}",
            self.statuses,
            self.out,
            self.err
        );
        self
    }

    /// Every process failed, and these words are in what they said.
    #[track_caller]
    fn failed(self, words: &[&str]) -> Self {
        assert!(self.statuses.iter().all(|status| *status != Some(0)), "{:?}\n{}", self.statuses, self.err);
        for word in words {
            assert!(self.err.contains(word), "{word:?} is not in: {}", self.err);
        }
        self
    }

    fn metrics(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.folder.join("metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The steps of its checkpoints, the latest last.
    fn checkpoints(&self) -> Vec<u64> {
        let names = fs::read_dir(&self.folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut steps: Vec<u64> =
            names.filter_map(|name| name.strip_prefix("checkpoint-").map(|step| step.parse().unwrap())).collect();
        steps.sort_unstable();
        steps
    }
}

/// The largest difference of a number of the steps of two runs, relative to it.
fn difference(one: &[Value], other: &[Value], what: &str) -> f64 {
    assert_eq!(one.len(), other.len());
    let pairs = one.iter().zip(other).map(|(one, other)| {
        let (one, other) = (one[what].as_f64().unwrap(), other[what].as_f64().unwrap());
        (one - other).abs() / one.abs()
    });
    pairs.fold(0.0, f64::max)
}
