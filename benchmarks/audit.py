"""What an audit with all methods costs, next to its part that RE alone would have cost: probe, RE, twin."""

from __future__ import annotations

from common import report_cost

from untrojan.audit import AuditOptions, audit
from untrojan.data.signs import make_signs
from untrojan.defenses.cleansing.registry import method_names


def main() -> None:
    data = make_signs(train_per_class=200, test_per_class=50)
    options = AuditOptions(methods=method_names("re,all"))
    costs = audit(data.train, options, trusted=data.test).costs
    alone = ("probe net", options.methods[0], "canary check")
    seconds = {
        "all methods": sum(cost.seconds for cost in costs.values()),
        "RE alone": sum(costs[stage].seconds for stage in alone if stage in costs),
    } | {stage: cost.seconds for stage, cost in costs.items()}
    report_cost("audit", seconds, "all methods", "RE alone", at_most=1.5)


if __name__ == "__main__":
    main()
