//! [`Processes`] themselves, as threads that meet over sockets.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use vitmae::Error;
use vitmae::distributed::{Launch, Meeting, Processes};
use vitmae::ops::Communicator;

/// Does `work` in `size` processes at once; what each made of it.
fn together<T: Send>(size: usize, work: impl Fn(Processes) -> T + Sync) -> Vec<T> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let join = |rank| {
        let meeting = Meeting {
            rank,
            size,
            local_rank: rank,
            local_size: size,
            address: "127.0.0.1".into(),
            port,
            run: String::new(),
        };
        Processes::join(&Launch::Tcp(meeting)).unwrap()
    };
    let (work, join) = (&work, &join);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..size).map(|rank| scope.spawn(move || work(join(rank)))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn sums_and_broadcasts_are_the_same_everywhere() {
    // More numbers than go at once, and a few.
    for length in [0_usize, 1, 7, 700_001] {
        let found = together(3, |processes| {
            let rank = processes.rank();
            let mut values: Vec<f32> = (0..length).map(|index| (index * 3 + rank) as f32).collect();
            processes.sum(&mut values).unwrap();
            let mut wide: Vec<f64> = (0..length).map(|index| 1e9 + (index * 3 + rank) as f64).collect();
            processes.sum_f64(&mut wide).unwrap();
            let shared = processes.share(vec![rank as u8 + 1; length * (3 - rank)]).unwrap();
            // From each in turn.
            let from_each: Vec<Vec<u8>> = (0..3)
                .map(|root| {
                    let mut bytes = vec![if rank == root { 10 + root as u8 } else { 0 }; length + root];
                    processes.broadcast(&mut bytes, root).unwrap();
                    bytes
                })
                .collect();
            processes.barrier().unwrap();
            (values, wide, shared, from_each)
        });
        for (values, wide, shared, from_each) in found {
            for (root, bytes) in from_each.iter().enumerate() {
                assert!(*bytes == vec![10 + root as u8; length + root], "from {root}");
            }
            let sum = |index: usize| 9 * index + 3;
            assert!(values.iter().enumerate().all(|(index, value)| *value == sum(index) as f32));
            assert!(wide.iter().enumerate().all(|(index, value)| *value == 3e9 + sum(index) as f64));
            assert_eq!(shared, vec![1; length * 3]);
        }
    }
}

#[test]
fn an_error_of_one_process_is_an_error_of_all() {
    let found = together(3, |processes| {
        assert_eq!(processes.agree_to_stop::<_, Error>(Ok(5), processes.rank() == 2).unwrap(), (5, true));
        processes.ready().unwrap();
        let own = if processes.rank() == 0 { Ok(()) } else { Err(Error::Config(format!("of {}", processes.rank()))) };
        let error = processes.agree(own).unwrap_err().to_string();
        // From now on there is nothing to agree on, and the end comes for all.
        processes.finish::<(), Error>(Err(Error::Config("again".into()))).unwrap_err();
        error
    });
    assert!(found[0].contains("process 1 of 3 has failed"), "{found:?}");
    assert!(found[1].contains("of 1"), "{found:?}");
    assert!(found[2].contains("process 1 of 3 has failed"), "{found:?}");
}

#[test]
fn settings_that_differ_are_named() {
    let found = together(2, |processes| {
        processes.check_same(&[("one", "1".into()), ("two", "2".into())]).unwrap();
        processes.check_same(&[("one", "1".into()), ("two", processes.rank().to_string())]).unwrap_err().to_string()
    });
    assert!(found[1].contains("two is 1 here and 0 on process 0"), "{found:?}");
    assert!(found[0].contains("process 1"), "{found:?}");
}

#[test]
fn a_process_that_leaves_is_named_to_all() {
    let found = together(3, |processes| {
        if processes.rank() == 1 {
            return String::new();
        }
        let error = processes.sum(&mut [1.0]).unwrap_err();
        assert!(matches!(error, Error::Distributed(_)), "{error:?}");
        // It stays so, and what went wrong here comes first.
        assert!(processes.barrier().is_err());
        assert!(
            processes.agree::<(), Error>(Err(Error::Config("own".into()))).unwrap_err().to_string().contains("own")
        );
        error.to_string()
    });
    assert!(found[0].contains("process 1 is gone") && found[2].contains("process 1 is gone"), "{found:?}");
}

#[test]
fn a_process_that_leaves_is_seen_without_an_exchange() {
    let found = together(3, |processes| {
        // A message that is on its way is no sign of anything.
        let early = processes.rank() == 1;
        if early {
            processes.sum_f64(&mut [1.0]).unwrap();
        } else {
            std::thread::sleep(Duration::from_millis(200));
            processes.alive().unwrap();
            processes.watch()().unwrap();
            processes.sum_f64(&mut [1.0]).unwrap();
        }
        if processes.rank() == 2 {
            return Vec::new();
        }
        let watch = processes.watch();
        let first = loop {
            if let Err(error) = watch() {
                break error.to_string();
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        // Nothing is waited for any more.
        let later = processes.sum_f64(&mut [1.0]).unwrap_err().to_string();
        drop(processes);
        vec![first, later, watch().unwrap_err().to_string()]
    });
    assert!(found[0][0].contains("process 2 is gone"), "{found:?}");
    assert!(found[1][0].contains("process 2 is gone"), "{found:?}");
    assert!(
        found[..2].iter().all(|texts| texts[1..].iter().all(|text| text.contains("earlier exchange"))),
        "{found:?}"
    );
    assert!(found[2].is_empty());
}

#[test]
fn processes_that_do_not_do_the_same_are_told() {
    let found = together(2, |processes| {
        let mut values = vec![0.0; 3 + processes.rank()];
        processes.sum(&mut values).map_err(|error| error.to_string())
    });
    assert!(
        found.iter().any(|result| result.as_ref().is_err_and(|text| text.contains("do not do the same"))),
        "{found:?}"
    );
    assert!(found.iter().all(Result::is_err), "{found:?}");
}

#[test]
fn strangers_are_turned_away() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let meeting = |rank| Meeting {
        rank,
        size: 2,
        local_rank: 0,
        local_size: 1,
        address: "127.0.0.1".into(),
        port,
        run: String::new(),
    };
    std::thread::scope(|scope| {
        let rank_0 = scope.spawn(move || Processes::join(&Launch::Tcp(meeting(0))).unwrap());
        let mut stranger = loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => break stream,
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(5)),
            }
        };
        stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let other = Processes::join(&Launch::Tcp(meeting(1))).unwrap();
        // Dropped only when both are done: either would take the other for dead.
        let other = scope.spawn(move || other.barrier().map(|()| other));
        let rank_0 = rank_0.join().unwrap();
        rank_0.barrier().unwrap();
        other.join().unwrap().unwrap();
    });
}

#[test]
fn processes_of_another_run_are_turned_away_and_told() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let meeting = |rank, size, run: &str| Meeting {
        rank,
        size,
        local_rank: 0,
        local_size: 1,
        address: "127.0.0.1".into(),
        port,
        run: run.into(),
    };
    std::thread::scope(|scope| {
        let rank_0 = scope.spawn(move || Processes::join(&Launch::Tcp(meeting(0, 2, "one"))).unwrap());
        // Those that say nothing hold nobody up: they stay until the others have met.
        let silent: Vec<_> = (0..3)
            .map(|_| {
                loop {
                    match TcpStream::connect(("127.0.0.1", port)) {
                        Ok(stream) => break stream,
                        Err(_) => std::thread::sleep(Duration::from_millis(5)),
                    }
                }
            })
            .collect();
        let refused = |size, run| Processes::join(&Launch::Tcp(meeting(1, size, run))).unwrap_err().to_string();
        let text = refused(3, "one");
        assert!(text.contains("does not have 3 processes") && text.contains("WORLD_SIZE"), "{text}");
        let text = refused(2, "two");
        assert!(text.contains("another run") && text.contains("MASTER_PORT"), "{text}");
        let other = Processes::join(&Launch::Tcp(meeting(1, 2, "one"))).unwrap();
        drop(silent);
        let other = scope.spawn(move || other.barrier().map(|()| other));
        let rank_0 = rank_0.join().unwrap();
        rank_0.barrier().unwrap();
        other.join().unwrap().unwrap();
    });
}

#[test]
fn a_batch_is_shared_out_evenly_or_not_at_all() {
    let found =
        together(3, |processes| (processes.share_of(12).unwrap(), processes.share_of(13), processes.share_of(2)));
    for (share, uneven, few) in found {
        assert_eq!(share, 4);
        let text = uneven.unwrap_err().to_string();
        assert!(text.contains("12 or 15"), "{text}");
        assert!(few.unwrap_err().to_string().contains("take 3"));
    }
}
