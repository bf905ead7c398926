//! What a simulated fleet must show: Little's law, refusals where there is too little room and nowhere else, and
//! that the same seed is the same report.
//!
//! Called by `cargo test`. Refuses figures that were read off a run: bounds come from the theory beside them.

use super::*;

const SHAPE: HostShape = HostShape {
    slots: 100,
    memory_mib: 1 << 20,
    shards: 4,
    pool: 64,
    templates: 16,
    cold_ns: 1_000_000_000,
};

fn scenario(hosts: usize, shape: HostShape) -> Scenario {
    Scenario { hosts, shape, service: Service::default(), seed: 1 }
}

/// One template, lives of 5 s, a load of `part` of all slots of 20 hosts.
fn load(part: f64) -> Trace {
    let per_s = part * 20.0 * 100.0 / 5.0;
    let load =
        Load { arrivals: 60_000, per_s, life_s: 5.0, burst: 1.0, templates: 1, memory_mib: 2048 };
    Trace::make(&load, 1).unwrap()
}

const EVERY: [Policy; 6] = [
    Policy::LeastOfTwo,
    Policy::LeastOfTwoStrict,
    Policy::LeastOfTwoAnywhere,
    Policy::LeastLoaded,
    Policy::RoundRobin,
    Policy::Random,
];

#[test]
fn nothing_is_refused_while_there_is_room_and_what_lives_is_rate_times_life() {
    for part in [0.3, 0.6, 0.85] {
        let trace = load(part);
        for policy in EVERY {
            let outcome = simulate(&scenario(20, SHAPE), &trace, policy).unwrap();
            assert_eq!((outcome.refused, outcome.created), (0, 60_000), "{part} {policy:?}");
            // Fleets start empty, which costs about one life of all the time.
            let span_s = trace.arrivals.last().unwrap().at_ns as f64 / 1e9;
            let expected = outcome.offered * (1.0 - 5.0 / span_s);
            let off = outcome.live_mean / expected - 1.0;
            assert!(off.abs() < 0.03, "{part} {policy:?}: {} for {expected}", outcome.live_mean);
        }
    }
}

#[test]
fn a_load_beyond_the_slots_is_refused_by_as_much_as_it_is_beyond() {
    for part in [1.25, 2.0] {
        let trace = load(part);
        for policy in EVERY {
            let outcome = simulate(&scenario(20, SHAPE), &trace, policy).unwrap();
            // What lives fills the slots, so 1 - 1/part of the arrivals go away; more are taken while it fills.
            let span_s = trace.arrivals.last().unwrap().at_ns as f64 / 1e9;
            let taken = 2000.0 * (1.0 + span_s / 5.0);
            let refused = 1.0 - taken / 60_000.0;
            let found = outcome.refused as f64 / 60_000.0;
            assert!((found - refused).abs() < 0.03, "{part} {policy:?}: {found} for {refused}");
            assert_eq!(outcome.live_max, 2000, "{part} {policy:?}");
        }
    }
}

#[test]
fn memory_refuses_as_slots_do() {
    let trace = load(0.5);
    // Sandboxes have 2 GiB: room for 40 on each host, where 50 would live.
    let shape = HostShape { memory_mib: 40 * 2048, ..SHAPE };
    for policy in EVERY {
        let outcome = simulate(&scenario(20, shape), &trace, policy).unwrap();
        assert_eq!(outcome.live_max, 800, "{policy:?}");
        assert!(outcome.refused > 6000, "{policy:?}: {}", outcome.refused);
    }
}

#[test]
fn the_same_seed_is_the_same_report_and_another_is_not() {
    let report = |seed| {
        let load = Load {
            arrivals: 20_000,
            per_s: 500.0,
            life_s: 4.0,
            burst: 5.0,
            templates: 30,
            memory_mib: 2048,
        };
        let trace = Trace::make(&load, seed).unwrap();
        let scenario = Scenario { seed, ..scenario(30, SHAPE) };
        let run = |policy| simulate(&scenario, &trace, policy).unwrap();
        let outcomes = EVERY.map(run);
        format!("{}{}", table(&outcomes), json(&outcomes))
    };
    assert_eq!(report(7), report(7));
    assert_ne!(report(7), report(8));
}

/// Short lives, so that hosts are busy with creates, on few shards.
fn busy(part: f64) -> (Scenario, Trace) {
    let shape = HostShape { slots: 40, shards: 1, pool: 4096, cold_ns: 0, ..SHAPE };
    // A create takes 0.86 ms on average.
    let load = Load {
        arrivals: 200_000,
        per_s: part * 50.0 / 0.00086,
        life_s: 0.005,
        burst: 1.0,
        templates: 1,
        memory_mib: 2048,
    };
    (scenario(50, shape), Trace::make(&load, 3).unwrap())
}

#[test]
fn two_choices_wait_less_than_one_at_high_load() {
    let (scenario, trace) = busy(0.9);
    let run = |policy| simulate(&scenario, &trace, policy).unwrap();
    let random = run(Policy::Random);
    for policy in [Policy::LeastOfTwo, Policy::LeastOfTwoAnywhere] {
        let two = run(policy);
        assert_eq!((two.refused, random.refused), (0, 0));
        let [two_p99, random_p99] = [&two, &random].map(|outcome| outcome.latency_ns[2]);
        assert!(two_p99 * 3 < random_p99 * 2, "{policy:?}: {two_p99} ns for {random_p99} ns");
    }
}

#[test]
fn hosts_with_the_template_are_found_and_so_fewer_bring_it_in() {
    let load = Load {
        arrivals: 50_000,
        per_s: 400.0,
        life_s: 10.0,
        burst: 1.0,
        templates: 200,
        memory_mib: 2048,
    };
    let trace = Trace::make(&load, 5).unwrap();
    let run = |policy| simulate(&scenario(50, SHAPE), &trace, policy).unwrap();
    let [affine, random] = [Policy::LeastOfTwo, Policy::Random].map(run);
    assert!(affine.cold * 5 < random.cold, "{} and {}", affine.cold, random.cold);
    assert!(affine.latency_ns[2] < random.latency_ns[2], "{affine:?} {random:?}");
}

#[test]
fn fleets_that_mean_nothing_are_refused() {
    let trace = load(0.5);
    for (hosts, shape) in [
        (0, SHAPE),
        (1025, SHAPE),
        (1, HostShape { slots: 0, ..SHAPE }),
        (1, HostShape { shards: 0, ..SHAPE }),
        (1, HostShape { memory_mib: 0, ..SHAPE }),
        (1, HostShape { templates: 0, ..SHAPE }),
        (1, HostShape { cold_ns: u64::MAX, ..SHAPE }),
    ] {
        assert!(simulate(&scenario(hosts, shape), &trace, Policy::Random).is_err(), "{shape:?}");
    }
}
