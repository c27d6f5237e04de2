//! What started this process and its sisters, as its environment tells.

use crate::{Error, Result};

/// Where processes meet when nobody says.
const PORT: u16 = 29_500;
/// More processes than process 0 could have connections to.
const MOST_PROCESSES: usize = 1 << 16;

/// Variables in which launchers say which run a process belongs to.
const RUNS: [&str; 2] = ["TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"];

/// How this process was started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Launch {
    /// Alone.
    Single,
    /// By an MPI launcher (`mpirun`, `srun --mpi=pmix`); MPI itself knows the rest.
    Mpi {
        /// This process as the launcher's variables tell, where they do.
        rank: Option<usize>,
        /// This process among those of this machine, from 0.
        local_rank: usize,
        /// The processes of this machine.
        local_size: usize,
    },
    /// By something that sets `RANK`, `WORLD_SIZE`, `MASTER_ADDR` (torchrun and others), or by `srun` with `MASTER_ADDR`.
    Tcp(Meeting),
}

/// Processes that meet at an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meeting {
    /// This process, from 0.
    pub rank: usize,
    /// All processes.
    pub size: usize,
    /// This process among those of this machine, from 0.
    pub local_rank: usize,
    /// The processes of this machine.
    pub local_size: usize,
    /// The machine of process 0.
    pub address: String,
    /// The port that process 0 listens at.
    pub port: u16,
    /// What the launcher calls this run, where it does: processes of another one are turned away.
    pub run: String,
}

impl Launch {
    /// What the environment variables of this process say.
    ///
    /// # Errors
    /// [`Error::Config`] for variables that contradict each other, are no numbers, or do not say where to meet.
    pub fn from_environment() -> Result<Self> {
        Self::from_variables(&|name| std::env::var(name).ok())
    }

    /// What variables say that `get` looks up.
    ///
    /// # Errors
    /// As [`Launch::from_environment`].
    pub fn from_variables(get: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let number = |name: &str| -> Result<Option<usize>> {
            match get(name) {
                None => Ok(None),
                Some(text) => text.trim().parse().map(Some).map_err(|_| {
                    Error::Config(format!("the variable {name} is {text:?}, expected a number of processes or a rank"))
                }),
            }
        };
        let first = |names: &[&str]| -> Result<Option<usize>> {
            names.iter().find_map(|name| number(name).transpose()).transpose()
        };

        if get("WORLD_SIZE").is_some() || get("RANK").is_some() {
            let (Some(rank), Some(size)) = (number("RANK")?, number("WORLD_SIZE")?) else {
                return Err(Error::Config(
                    "RANK and WORLD_SIZE belong together, and one of them is not set; unset both to run alone".into(),
                ));
            };
            let local_size = number("LOCAL_WORLD_SIZE")?;
            let local_rank = number("LOCAL_RANK")?;
            return Self::meeting(get, (rank, size), (local_rank, local_size));
        }
        let slurm = (number("SLURM_PROCID")?, number("SLURM_STEP_NUM_TASKS")?);
        if let (Some(rank), Some(size)) = slurm
            && get("MASTER_ADDR").is_some()
        {
            let local_size = first(&["SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"]).unwrap_or_default();
            return Self::meeting(get, (rank, size), (number("SLURM_LOCALID")?, local_size));
        }
        let started_by_mpi = ["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"];
        if let Some(rank) = first(&started_by_mpi)? {
            let sizes = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"];
            let size = first(&sizes)?;
            // PMIx alone does not say how many there are: only MPI knows.
            if size == Some(1) || (size.is_none() && !cfg!(feature = "mpi")) {
                return Ok(Self::Single);
            }
            let local_ranks =
                ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"];
            let local_sizes = ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE"];
            let local_rank = first(&local_ranks)?.unwrap_or(rank);
            return Ok(Self::Mpi {
                rank: Some(rank),
                local_rank,
                local_size: first(&local_sizes)?.unwrap_or(1).max(1),
            });
        }
        match slurm {
            (Some(rank), Some(size)) if size > 1 => Err(Error::Config(format!(
                "this is task {rank} of {size} of a Slurm step, and nothing says how the tasks meet: set MASTER_ADDR to the host \
                 of task 0, or use srun --mpi=pmix with a program built with --features mpi"
            ))),
            _ => Ok(Self::Single),
        }
    }

    fn meeting(
        get: &dyn Fn(&str) -> Option<String>,
        (rank, size): (usize, usize),
        (local_rank, local_size): (Option<usize>, Option<usize>),
    ) -> Result<Self> {
        if rank >= size {
            return Err(Error::Config(format!("process {rank} of {size}: ranks go from 0 to one less than the size")));
        }
        if size > MOST_PROCESSES {
            return Err(Error::Config(format!("{size} processes are more than {MOST_PROCESSES}: check WORLD_SIZE")));
        }
        if let (Some(local_rank), Some(local_size)) = (local_rank, local_size)
            && local_rank >= local_size
        {
            return Err(Error::Config(format!(
                "process {local_rank} of {local_size} on this machine: LOCAL_RANK goes from 0 to one less than LOCAL_WORLD_SIZE"
            )));
        }
        if size == 1 {
            return Ok(Self::Single);
        }
        let Some(address) = get("MASTER_ADDR").filter(|address| !address.is_empty()) else {
            return Err(Error::Config(format!(
                "process {rank} of {size} does not know where to meet the others: set MASTER_ADDR to the machine of process 0 \
                 (and MASTER_PORT, by default {PORT})"
            )));
        };
        let port = match get("MASTER_PORT") {
            None => PORT,
            Some(text) => match text.trim().parse() {
                Ok(port) if port > 0 => port,
                _ => return Err(Error::Config(format!("the variable MASTER_PORT is {text:?}, expected a port"))),
            },
        };
        // torchrun's agent keeps that port for itself.
        let port =
            if get("TORCHELASTIC_USE_AGENT_STORE").as_deref() == Some("True") { port.wrapping_add(1) } else { port };
        let local_rank = local_rank.unwrap_or(local_size.map_or(rank, |local| rank % local.max(1)));
        let local_size = local_size.unwrap_or(1).max(1);
        let run = RUNS.iter().find_map(|name| get(name)).unwrap_or_default();
        Ok(Self::Tcp(Meeting { rank, size, local_rank, local_size, address, port, run }))
    }

    /// This process as far as the environment tells, from 0.
    #[must_use]
    pub fn rank(&self) -> usize {
        match self {
            Self::Single => 0,
            Self::Mpi { rank, .. } => rank.unwrap_or(0),
            Self::Tcp(meeting) => meeting.rank,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(variables: &[(&str, &str)]) -> Result<Launch> {
        Launch::from_variables(&|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn an_empty_environment_is_one_process() {
        assert_eq!(launch(&[]).expect("nothing"), Launch::Single);
        assert_eq!(launch(&[("RANK", "0"), ("WORLD_SIZE", "1")]).expect("one"), Launch::Single);
        // A batch script, not started by srun.
        assert_eq!(launch(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")]).expect("script"), Launch::Single);
        let alone = [("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "1")];
        assert_eq!(launch(&alone).expect("mpirun -n 1"), Launch::Single);
    }

    #[test]
    fn torchruns_variables_are_read() {
        let variables = [
            ("RANK", "5"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_RANK", "1"),
            ("LOCAL_WORLD_SIZE", "4"),
            ("MASTER_ADDR", "node0"),
            ("MASTER_PORT", "1234"),
        ];
        let expected = Meeting {
            rank: 5,
            size: 8,
            local_rank: 1,
            local_size: 4,
            address: "node0".into(),
            port: 1234,
            run: String::new(),
        };
        assert_eq!(launch(&variables).expect("complete"), Launch::Tcp(expected.clone()));
        let agent: Vec<_> = variables.iter().copied().chain([("TORCHELASTIC_USE_AGENT_STORE", "True")]).collect();
        assert_eq!(launch(&agent).expect("torchrun"), Launch::Tcp(Meeting { port: 1235, ..expected.clone() }));
        let named: Vec<_> = variables.iter().copied().chain([("TORCHELASTIC_RUN_ID", "x7")]).collect();
        assert_eq!(launch(&named).expect("named"), Launch::Tcp(Meeting { run: "x7".into(), ..expected.clone() }));
        let few = [("RANK", "5"), ("WORLD_SIZE", "8"), ("MASTER_ADDR", "node0")];
        let expected = Meeting { local_rank: 5, local_size: 1, port: PORT, ..expected };
        assert_eq!(launch(&few).expect("the least"), Launch::Tcp(expected));
    }

    #[test]
    fn slurms_and_mpis_variables_are_read() {
        let task = [("SLURM_PROCID", "3"), ("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_LOCALID", "1")];
        assert!(launch(&task).is_err(), "nothing says where to meet");
        let meeting: Vec<_> = task.iter().copied().chain([("MASTER_ADDR", "a")]).collect();
        let Ok(Launch::Tcp(meeting)) = launch(&meeting) else { panic!("srun with an address") };
        assert_eq!((meeting.rank, meeting.size, meeting.local_rank), (3, 4, 1));
        let mpirun =
            [("OMPI_COMM_WORLD_RANK", "2"), ("OMPI_COMM_WORLD_SIZE", "4"), ("OMPI_COMM_WORLD_LOCAL_RANK", "0")];
        let expected = Launch::Mpi { rank: Some(2), local_rank: 0, local_size: 1 };
        assert_eq!(launch(&mpirun).expect("mpirun"), expected);
        let pmix: Vec<_> = task.iter().copied().chain([("PMIX_RANK", "3")]).collect();
        let expected = Launch::Mpi { rank: Some(3), local_rank: 1, local_size: 1 };
        assert_eq!(launch(&pmix).expect("srun --mpi=pmix"), expected);
    }

    #[test]
    fn what_is_wrong_with_variables_is_said() {
        let cases: [(&[(&str, &str)], &str); 9] = [
            (&[("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "0")], "MASTER_PORT"),
            (&[("RANK", "0"), ("WORLD_SIZE", "99999999999"), ("MASTER_ADDR", "a")], "WORLD_SIZE"),
            (
                &[
                    ("RANK", "0"),
                    ("WORLD_SIZE", "8"),
                    ("LOCAL_RANK", "7"),
                    ("LOCAL_WORLD_SIZE", "2"),
                    ("MASTER_ADDR", "a"),
                ],
                "LOCAL_RANK",
            ),
            (&[("RANK", "0")], "WORLD_SIZE"),
            (&[("RANK", "x"), ("WORLD_SIZE", "2")], "RANK"),
            (&[("RANK", "2"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a")], "process 2 of 2"),
            (&[("RANK", "1"), ("WORLD_SIZE", "2")], "MASTER_ADDR"),
            (&[("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "99999")], "MASTER_PORT"),
            (&[("RANK", "-1"), ("WORLD_SIZE", "2")], "RANK"),
        ];
        for (variables, word) in cases {
            let text = launch(variables).expect_err("wrong").to_string();
            assert!(text.contains(word), "{variables:?}: {text}");
        }
    }
}
