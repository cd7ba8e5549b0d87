"""The gates of a comparison as JUnit XML, one test case each."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from service.evaluation.compare import Comparison
from service.evaluation.gates import GateResult


def junit_xml(comparison: Comparison, gates: Sequence[GateResult], failures: int) -> bytes:
    """Return a `testsuites` document.

    failures: images that the first model answers and the second does not; a case of their own.
    """
    name = f"camserve compare {comparison.one.name} {comparison.other.name}"
    cases = [(gate.name, gate.is_kept, str(gate)) for gate in gates]
    cases.append(
        ("answers", not failures, f"{failures} images that only {comparison.one.name} answers")
    )
    broken = str(sum(not is_kept for _, is_kept, _ in cases))
    root = Element("testsuites", name=name, tests=str(len(cases)), failures=broken)
    suite = SubElement(root, "testsuite", name=name, tests=str(len(cases)), failures=broken)
    for case, is_kept, text in cases:
        found = SubElement(suite, "testcase", classname="camserve.compare", name=case)
        if is_kept:
            SubElement(found, "system-out").text = text
        else:
            SubElement(found, "failure", message=text).text = text
    document: bytes = tostring(root, encoding="utf-8", xml_declaration=True)
    return document
