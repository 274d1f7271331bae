"""From a plan to its cells and the stages they share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from untrojan.bench.graph import Cell, Stage
from untrojan.bench.plan import AttackEntry, DefenseEntry, NetEntry, Plan, ScanEntry, matching
from untrojan.bench.versions import VERSIONS
from untrojan.errors import UntrojanError
from untrojan.registry import options_of

if TYPE_CHECKING:
    from untrojan.attacks.crafted import Surrogate

GOING_ON = (None, "none")
"""Training defences, or none, of whoever has a trained model already: NONE's rounds follow any training."""
COMPUTED_TRIGGERS = ("universal",)
"""Triggers that are computed on a clean model, not drawn."""


def expand(plan: Plan) -> list[Cell]:
    """Every cell of the plan once, all of the first seed before any of the second."""
    found: dict[tuple[str, str, str, str, int], Cell] = {}
    resolved = _Resolved(plan)
    for data, net, attack, defense, seed in _coordinates(plan):
        place = (data, net, attack, defense, seed)
        if place not in found:
            found[place] = _Expansion(resolved, data, net, seed).cell(attack, defense)
    order = {seed: index for index, seed in enumerate(dict.fromkeys(place[4] for place in found))}
    return sorted(found.values(), key=lambda cell: order[int(cell.axes["seed"])])


def _coordinates(plan: Plan) -> Iterator[tuple[str, str, str, str, int]]:
    for grid in plan.grid:
        axes = []
        for axis in ("data", "nets", "attacks", "defenses"):
            known = list(getattr(plan, axis))
            axes.append(list(dict.fromkeys(n for p in getattr(grid, axis) for n in matching(p, known))))
        yield from itertools.product(*axes, grid.seeds or plan.seeds)


class _Resolved:
    """A plan's recipes, attacks and defences with all their options, each looked up once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        recipes = ((net.victim, net.probe, net.second_probe) for net in plan.nets.values())
        probes = (entry.probe.recipe for entry in plan.defenses.values() if entry.probe is not None)
        named = itertools.chain(itertools.chain.from_iterable(recipes), probes)
        names = dict.fromkeys(name for name in named if name is not None)
        self.recipes = {name: options_of(plan.recipe(name)) for name in names}
        self.attacks = {name: _attack_options(entry) for name, entry in plan.attacks.items()}
        self.defenses = {name: _defense_options(entry) for name, entry in plan.defenses.items()}
        scans = {name: entry.scan for name, entry in plan.defenses.items()}
        self.scans = {name: _scan_options(scan) for name, scan in scans.items() if scan is not None}


def _attack_options(entry: AttackEntry) -> dict[str, Any] | None:
    if entry.clean:
        return None
    if entry.federated is not None:
        return {"federated": entry.federated.model_dump()}
    if entry.sdrm is not None:
        return {"infection": options_of(entry.sdrm.infection()), "method": options_of(entry.sdrm.method())}
    # Names of classes stay names: what they stand for is known once the data are.
    named: dict[str, Any] = entry.model_dump(include={"target", "sources"}, exclude_none=True)
    if entry.method is not None:
        settings = options_of(entry.crafted())
        classes: dict[str, Any] = {k: settings.pop(k) for k in ("target", "sources") if k in settings}
        return {"method": entry.method, "options": settings, **classes, **named}
    return options_of(entry.poisoning()) | named


def _surrogate(options: Mapping[str, Any]) -> Surrogate:
    """What the attacker needs a clean model of, before there is a poisoned set."""
    from untrojan.attacks.crafted import CRAFTED_ATTACKS

    if "method" in options:
        return CRAFTED_ATTACKS.get(options["method"]).surrogate
    return "all classes" if options["trigger"] in COMPUTED_TRIGGERS else "none"


def _delivers_model(options: Mapping[str, Any] | None) -> bool:
    from untrojan.attacks.crafted import CRAFTED_ATTACKS

    return bool(options and "method" in options and CRAFTED_ATTACKS.get(options["method"]).delivers_model)


def _pair(options: Mapping[str, Any] | None) -> list[Any] | None:
    """Source and target of an attack on the transfer to two classes, else None."""
    if options is None or _surrogate(options) != "other classes":
        return None
    return [options["sources"][0], options["target"]]


def _defense_options(entry: DefenseEntry) -> dict[str, Any]:
    from untrojan.defenses.cleansing.registry import CLEANSERS
    from untrojan.defenses.repair.registry import REPAIRS
    from untrojan.defenses.training.registry import TRAINING_DEFENSES

    if entry.repair is not None:
        return options_of(REPAIRS.build(entry.repair, entry.options))
    if entry.training is not None:
        return options_of(TRAINING_DEFENSES.build(entry.training, entry.options))
    if entry.cleanser is None:
        return {}
    return options_of(CLEANSERS.build(entry.cleanser, entry.options))


def _scan_options(entry: ScanEntry) -> dict[str, Any]:
    from untrojan.defenses.scanning.registry import SCANNERS

    return options_of(SCANNERS.build(entry.method, entry.options))


def _seeded(options: Mapping[str, Any], given: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A method's options, under the cell's seed unless the plan has ``given`` one."""
    return dict(options) | ({"seed": seed} if "seed" in options and "seed" not in given else {})


class _Expansion:
    """The stages of cells with the same data, net and seed."""

    def __init__(self, resolved: _Resolved, data: str, net: str, seed: int) -> None:
        plan = resolved.plan
        self.resolved, self.plan = resolved, plan
        self.data_name, self.net_name, self.seed = data, net, seed
        self.net: NetEntry = plan.nets[net]
        self.control = next((entry for entry in plan.attacks.values() if entry.clean), None)
        entry = plan.data[data]
        self.data = self._stage("data", {"name": data, **entry.model_dump(exclude={"source"})}, {}, data)

    def cell(self, attack_name: str, defense_name: str) -> Cell:
        attack, defense = self.plan.attacks[attack_name], self.plan.defenses[defense_name]
        if attack.clean and defense.exposure is not None:
            return self._exposed_control(attack_name, defense_name)
        if attack.federated is not None:
            return self._federated_cell(attack_name, defense_name)
        if attack.sdrm is not None or defense.exposure is not None or defense.pruning is not None:
            return self._infected_cell(attack_name, defense_name)
        # Controls differ by their training; the attack's draw and the victim's training share one seed.
        seed = self.seed + attack.seed_offset
        options = self.resolved.attacks[attack_name]
        poisoned = self._poisoned(attack_name, options, seed)
        pretrained = self._pretrained(poisoned, options)
        victim = self._trained(self.net.victim, poisoned, seed, f"{attack_name} victim", pretrained)
        if _delivers_model(options):
            victim = self._stage("deliver", victim.config, victim.inputs, f"{attack_name} model")
        known = self._known(poisoned)
        start = victim if pretrained else None
        if defense.after is not None:
            trained = self._trained_defended(attack_name, defense.after, known, seed, start)
            victim, undefended = trained["defense"], trained["defended"]
        else:
            undefended = self._evaluated(victim, known, f"{attack_name} undefended")
        stages = {"data": self.data, "undefended": undefended}
        if options and (self.control or _surrogate(options) != "none"):
            stages["clean_model"] = self._clean_model(poisoned, attack_name, options)
        if defense.cleanser is not None:
            stages |= self._defended(attack_name, defense_name, defense, poisoned, victim, seed)
        if defense.training is not None:
            stages |= self._trained_defended(attack_name, defense_name, known, seed, start)
        if defense.repair is not None:
            stages |= self._repaired(attack_name, defense_name, defense, known, victim, seed)
        model = stages.get("repair") or stages.get("defense") or victim
        stages |= self._assessed(attack_name, defense_name, known, victim, model, seed)
        if defense.scan is not None:
            stages |= self._scanned(attack_name, defense_name, defense.scan, poisoned, model, seed)
        axes = self._axes(attack_name, defense_name)
        deciding = stages.get("audit") or stages.get("defense") or stages.get("repair") or stages.get("scan")
        config = {
            "data": dict(self.data.config),
            "architecture": self.net.architecture,
            "victim": self.resolved.recipes[self.net.victim],
            "probe": self.resolved.recipes[defense.probe.recipe if defense.probe else self.net.probe],
            "attack": dict(poisoned.config),
            "defense": dict(deciding.config) if deciding else None,
        }
        return Cell(axes, stages, config)

    def _infected_cell(self, attack_name: str, defense_name: str) -> Cell:
        """A model that its trainer infected, and a detector that is asked about it."""
        attack, defense = self.plan.attacks[attack_name], self.plan.defenses[defense_name]
        options = self.resolved.attacks[attack_name]
        asks_set = defense.cleanser and not defense.exposure
        unfit = asks_set or defense.training not in GOING_ON or defense.after is not None
        if attack.sdrm is None or options is None or unfit:
            raise UntrojanError(
                f"cell {attack_name}/{defense_name}: infected models (sdrm) go with exposure, pruning, "
                'scans, repairs and training = "none": keep other attacks and defences apart by [[grid]]'
            )
        recipe = self.resolved.recipes[self.net.victim]
        seed = self.seed + attack.seed_offset
        config = {"architecture": self.net.architecture, "recipe": recipe, "seed": seed, **options}
        infected = self._stage(
            "infect", config, {"data": self.data}, f"{attack_name} model", profile=self.net.victim
        )
        stages = {"data": self.data, "undefended": infected}
        asked: dict[str, Any] | None = None
        known = {"data": self.data, "infected": infected}
        if defense.exposure is not None:
            stages["exposure"] = self._exposed(attack_name, defense_name, known, seed)
            asked = dict(stages["exposure"].config)
        if defense.pruning is not None:
            asked = defense.pruning.model_dump()
            stages["pruning"] = self._stage("prune", asked, known, f"{attack_name} {defense_name}")
        if defense.training is not None:
            stages |= self._trained_defended(attack_name, defense_name, known, seed, infected)
            asked = dict(stages["defense"].config)
        if defense.repair is not None:
            stages |= self._repaired(attack_name, defense_name, defense, known, infected, seed)
            asked = dict(stages["repair"].config)
        model = stages.get("repair") or stages.get("defense") or infected
        stages |= self._assessed(attack_name, defense_name, known, infected, model, seed)
        if defense.scan is not None:
            stages |= self._scanned(
                attack_name, defense_name, defense.scan, self._clean(), model, seed, infected
            )
            asked = dict(stages["scan"].config)
        axes = self._axes(attack_name, defense_name)
        return Cell(axes, stages, {"data": dict(self.data.config), "attack": config, "defense": asked})

    def _federated_cell(self, attack_name: str, defense_name: str) -> Cell:
        """Clients who train one model together, and NONE on what they report."""
        defense = self.plan.defenses[defense_name]
        others = (defense.cleanser, defense.repair, defense.scan, defense.exposure, defense.pruning)
        if any(others) or defense.training not in GOING_ON:
            raise UntrojanError(
                f'cell {attack_name}/{defense_name}: federations go with training = "none" or no defence: '
                "keep other defences apart by [[grid]]"
            )
        seed = self.seed + self.plan.attacks[attack_name].seed_offset
        options = self.resolved.defenses[defense_name]
        config = {
            "architecture": self.net.architecture,
            "recipe": self.resolved.recipes[self.net.victim],
            **(self.resolved.attacks[attack_name] or {}),
            "defense": _seeded(options, defense.options, seed) if defense.training else None,
            "seed": seed,
        }
        label, profile = f"{attack_name} {defense_name}", f"{self.net.victim} {defense_name}"
        federated = self._stage("federate", config, {"data": self.data}, label, profile=profile)
        stages = {"data": self.data, "federated": federated}
        return Cell(self._axes(attack_name, defense_name), stages, {"data": dict(self.data.config), **config})

    def _exposed_control(self, attack_name: str, defense_name: str) -> Cell:
        """A model without a backdoor, and a detector that should find nothing."""
        seed = self.seed + self.plan.attacks[attack_name].seed_offset
        clean = self._clean()
        victim = self._trained(self.net.victim, clean, seed, f"{attack_name} victim")
        exposed = self._exposed(attack_name, defense_name, {"data": self.data, "model": victim}, seed)
        undefended = self._evaluated(victim, self._known(clean), f"{attack_name} undefended")
        stages = {"data": self.data, "undefended": undefended, "exposure": exposed}
        config = {"data": dict(self.data.config), "attack": None, "defense": dict(exposed.config)}
        return Cell(self._axes(attack_name, defense_name), stages, config)

    def _exposed(self, attack: str, name: str, known: Mapping[str, Stage], seed: int) -> Stage:
        defense = self.plan.defenses[name]
        assert defense.exposure is not None
        chosen = dict(self.resolved.defenses[name])
        asked = {"cleanser": defense.cleanser, "options": chosen, "seed": seed}
        # What came later is named only where it is not as it always was: keys of stored stages stay the same.
        later = {"trusted_as", "trusted_from"}
        asked |= defense.exposure.model_dump(exclude=later)
        asked |= defense.exposure.model_dump(include=later, exclude_defaults=True)
        return self._stage("expose", asked, known, f"{attack} {name}", profile=name)

    def _scanned(
        self, attack: str, name: str, asked: ScanEntry, poisoned: Stage, model: Stage, seed: int,
        infected: Stage | None = None,
    ) -> dict[str, Stage]:  # fmt: skip
        """A scan of ``model`` and its score; of a model infected by its trainer, ``poisoned`` is the clean
        set."""
        options = _seeded(self.resolved.scans[name], asked.options, seed)
        config = {"scanner": asked.method, "options": options, "share": asked.share, "seed": seed}
        known = self._known(poisoned)
        label = f"{attack} {name}"
        scan = self._stage("scan", config, known | {"model": model}, f"{label} scan", profile=name)
        truth = known if infected is None else known | {"infected": infected}
        scored = self._stage("score_scan", {}, truth | {"scan": scan}, f"{label} scan's score")
        return {"scan": scan, "scored": scored}

    def _axes(self, attack_name: str, defense_name: str) -> dict[str, str | int]:
        return {
            "data": self.data_name,
            "net": self.net_name,
            "attack": attack_name,
            "defense": defense_name,
            "seed": self.seed,
        }

    def _poisoned(self, name: str, options: dict[str, Any] | None, seed: int) -> Stage:
        if options is None:
            return self._clean()
        inputs = {"data": self.data}
        if _surrogate(options) != "none":
            inputs["surrogate"] = self._surrogate_model(name, options, seed)
        return self._stage("poison", {"attack": options, "seed": seed}, inputs, f"{name} poisoned set")

    def _surrogate_model(self, name: str, options: dict[str, Any], seed: int) -> Stage:
        """The attacker's own model: trained as the victim will be, from another seed."""
        pair = _pair(options)
        clean = self._clean() if pair is None else self._clean(without=pair)
        return self._trained(self.net.victim, clean, seed + 1_000_003, f"{name} surrogate")

    def _clean(self, **classes: list[Any]) -> Stage:
        return self._stage("poison", {"attack": None, **classes}, {"data": self.data}, "clean set")

    def _trained(
        self, recipe: str, poisoned: Stage, seed: int, label: str, pretrained: Stage | None = None,
        architecture: str | None = None,
    ) -> Stage:  # fmt: skip
        """A model, the net's where no ``architecture`` is given; where ``pretrained`` is, that model's
        features beneath a last layer of its own."""
        config = {
            "architecture": architecture or self.net.architecture,
            "recipe": self.resolved.recipes[recipe],
            "seed": seed,
        }
        inputs = {"data": self.data, "poisoned": poisoned}
        if pretrained is not None:
            inputs["pretrained"] = pretrained
        return self._stage("train", config, inputs, label, profile=recipe)

    def _known(self, poisoned: Stage) -> dict[str, Stage]:
        return {"data": self.data, "poisoned": poisoned}

    def _evaluated(self, model: Stage, known: Mapping[str, Stage], label: str) -> Stage:
        """``known`` as in :meth:`_trained_defended`."""
        return self._stage("evaluate", {}, {**known, "model": model}, label)

    def _clean_model(self, poisoned: Stage, name: str, options: dict[str, Any]) -> Stage:
        """What the pattern alone does to a model that was never poisoned nor seen by the attacker: the
        plan's first clean control, where it has one."""
        offset = self.control.seed_offset if self.control else 2_000_003
        pair, pretrained = _pair(options), self._pretrained(poisoned, options)
        clean_set = self._clean() if pair is None else self._clean(only=pair)
        clean = self._trained(
            self.net.victim, clean_set, self.seed + offset, f"{name} clean model", pretrained
        )
        return self._evaluated(clean, self._known(poisoned), f"{name} clean model")

    def _pretrained(self, poisoned: Stage, options: dict[str, Any] | None) -> Stage | None:
        """The model that victims of a transfer attack transfer from: the attacker knows it."""
        return None if _pair(options) is None else poisoned.inputs["surrogate"]

    def _defended(
        self, attack: str, name: str, defense: DefenseEntry, poisoned: Stage, victim: Stage, seed: int
    ) -> dict[str, Stage]:
        pretrained = victim.inputs.get("pretrained")
        own = defense.probe
        if own is None:
            probe = self._trained(self.net.probe, poisoned, seed, f"{attack} probe", pretrained)
        else:
            probe = self._trained(
                own.recipe, poisoned, seed, f"{attack} {name} probe", architecture=own.architecture
            )
        options = _seeded(self.resolved.defenses[name], defense.options, seed)
        config: dict[str, Any] = {"cleanser": defense.cleanser, "options": options}
        if not defense.canaries:
            config["canaries"] = False
        if defense.trusted_per_class is not None:
            config["trusted_per_class"] = defense.trusted_per_class
        known = self._known(poisoned)
        probes = {"probe": probe}
        if self.net.second_probe is not None and own is None:
            probes["second_probe"] = self._trained(
                self.net.second_probe, poisoned, seed, f"{attack} second probe", pretrained
            )
        audit = self._stage("audit", config, known | probes, f"{attack} {name} audit", profile=name)
        stages = {
            "probe": self._evaluated(probe, known, f"{attack} probe's accuracy"),
            "audit": audit,
            "score": self._stage("score", {}, known | {"audit": audit}, f"{attack} {name} score"),
        }
        if defense.retrain:
            inputs = known | {"audit": audit, "victim": victim}
            if pretrained is not None:
                inputs["pretrained"] = pretrained
            told = {"target_known": True} if defense.target_known else {}
            retrained = self._stage(
                "retrain", {**victim.config, **told}, inputs, f"{attack} {name} retrained",
                profile=self.net.victim,
            )  # fmt: skip
            stages["retrained"] = self._evaluated(retrained, known, f"{attack} {name} after retraining")
        return stages

    def _trained_defended(
        self, attack: str, name: str, known: Mapping[str, Stage], seed: int, start: Stage | None
    ) -> dict[str, Stage]:
        """``known`` are the data and the poisoned set, or the model whose trainer infected it; training goes
        on from ``start`` where there is one."""
        defense = self.plan.defenses[name]
        if start is not None and defense.training not in GOING_ON:
            raise UntrojanError(
                f"cell {attack}/{name}: {defense.training} trains anew, and this is an attack on transfer: "
                'only training = "none" goes on from a model; keep others apart by [[grid]]'
            )
        config = {
            "architecture": self.net.architecture,
            "recipe": self.resolved.recipes[self.net.victim],
            "defense": defense.training,
            "options": _seeded(self.resolved.defenses[name], defense.options, seed),
        }
        label = f"{attack} {name}"
        trained = self._stage(
            "defend", config, {**known, **({"start": start} if start else {})}, f"{label} training",
            profile=f"{self.net.victim} {name}",
        )  # fmt: skip
        return {
            "defense": trained,
            "defended": self._evaluated(trained, known, f"{label} model"),
            "dropping": self._stage("score_dropped", {}, {**known, "defense": trained}, f"{label} dropped"),
        }

    def _repaired(
        self, attack: str, name: str, defense: DefenseEntry, known: Mapping[str, Stage], victim: Stage,
        seed: int,
    ) -> dict[str, Stage]:  # fmt: skip
        """``known`` as in :meth:`_trained_defended`."""
        config = {
            "architecture": self.net.architecture,
            "repair": defense.repair,
            "options": _seeded(self.resolved.defenses[name], defense.options, seed),
            "share": defense.share,
            "seed": seed,
        }
        label = f"{attack} {name}"
        repaired = self._stage("repair", config, {**known, "victim": victim}, f"{label} repair", profile=name)
        return {"repair": repaired, "repaired": self._evaluated(repaired, known, f"{label} repaired")}

    def _assessed(
        self, attack: str, name: str, known: Mapping[str, Stage], victim: Stage, model: Stage, seed: int
    ) -> dict[str, Stage]:
        """What the defence did to ``victim`` beside its task."""
        defense = self.plan.defenses[name]
        if not defense.robustness and defense.distance is None:
            return {}
        asked = {
            "robustness": defense.robustness,
            "distance": defense.distance,
            "share": defense.share,
            "seed": seed,
            **({"distance_options": defense.distance_options} if defense.distance_options else {}),
        }
        gauged = self._stage(
            "gauge", asked, {**known, "victim": victim}, f"{attack} undefended effects",
            profile=f"{defense.robustness} {defense.distance}",
        )  # fmt: skip
        inputs = {**known, "victim": victim, "defended": model, "gauged": gauged}
        return {"effects": self._stage("assess", asked, inputs, f"{attack} {name} effects", profile=name)}

    def _stage(
        self, kind: str, config: Mapping[str, Any], inputs: Mapping[str, Stage], label: str, profile: str = ""
    ) -> Stage:
        where = f"{self.data_name}/{self.net_name}"
        # The data's path is no part of any key, but how long a stage takes depends on data and net.
        label, profile = f"{label} ({where}, seed {self.seed})", f"{kind}/{where}/{profile}"
        return Stage(kind, config, inputs, VERSIONS[kind], label, profile)
