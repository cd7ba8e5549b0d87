"""What a labeling config has room for, and which label a class gets."""

from __future__ import annotations

import pytest
from counting import lines_run
from tiny import SmallNet, loaded

from service.errors import InvalidImageData, InvalidOption
from service.integrations.label_studio.host import LabelStudio
from service.integrations.label_studio.label_config import images_in, model_version, parameters_in

CONFIG = """<View>
  <Style>.x {}</Style>
  <Header value="Look"/>
  <View style="display:flex"><Image name="photo" value="$image"/></View>
  <Image name="heat" value="http://service/overlay.png?key=k&amp;src=$image"/>
  <Choices name="kind" toName="photo">
    <Choice value="Cat"/><View><Choice value="Dog"/></View>
  </Choices>
  <BrushLabels name="cam" toName="photo"><Label value="cam"/></BrushLabels>
  <KeyPointLabels name="mark" toName="photo">
    <Label value="cat"/><Label value="peak"/>
  </KeyPointLabels>
  <TextArea name="note" toName="photo"/>
  <Ranker name="order" toName="photo"/>
</View>"""


def control(inner: str, tag: str = "RectangleLabels", more: str = ""):
    config = (
        f'<View><Image name="i" value="$image"/><{tag} name="c" toName="i" {more}>{inner}</{tag}>'
        "</View>"
    )
    ((found,),) = (image.controls for image in images_in(config))
    return found


def labels(*values: str) -> str:
    return "".join(f'<Label value="{value}"/>' for value in values)


def test_controls_are_found_wherever_they_stand() -> None:
    (image,) = images_in(CONFIG)
    assert (image.name, image.value) == ("photo", "$image")
    assert [(each.name, each.kind) for each in image.controls] == [
        ("kind", "choices"),
        ("cam", "brushlabels"),
        ("mark", "keypointlabels"),
    ]
    assert [label.name for label in image.controls[0].labels] == ["Cat", "Dog"]


@pytest.mark.parametrize(
    "config",
    [
        "<View/>",
        '<View><Image name="i" value="$image"/></View>',
        '<View><Image name="i" value="$image"/><TextArea name="t" toName="i"/></View>',
        (
            '<View><Text name="i" value="$text"/><Choices name="c" toName="i">'
            '<Choice value="a"/></Choices></View>'
        ),
        '<View><Image name="i" value="$image"/><Choices name="c" toName="i"/></View>',
        (
            '<View><Image name="i" valueList="$images"/><BrushLabels name="c" toName="i">'
            '<Label value="a"/></BrushLabels></View>'
        ),
        (
            '<View><Image name="i" value="$image"/><Choices name="c" toName="i">'
            '<Choice value="$from_the_task"/></Choices></View>'
        ),
    ],
)
def test_a_config_without_room_for_evidence_has_no_images(config: str) -> None:
    assert images_in(config) == ()


def test_several_images_have_their_own_controls() -> None:
    config = """<View><Image name="left" value="$a"/><Image name="right" value="$b"/>
      <BrushLabels name="l" toName="left"><Label value="cam"/></BrushLabels>
      <Choices name="both" toName="left, right"><Choice value="cat"/></Choices></View>"""
    left, right = images_in(config)
    assert [each.name for each in left.controls] == ["l", "both"]
    assert [(each.name, each.to_name) for each in right.controls] == [("both", "right")]


@pytest.mark.parametrize(
    "config", ["", "no XML", "<View>", '<!DOCTYPE v [<!ENTITY a "a">]><View>&a;</View>']
)
def test_what_is_no_labeling_config_is_refused(config: str) -> None:
    with pytest.raises(InvalidOption, match="label_config"):
        images_in(config)


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (("cat", "dog", "cam"), "cat"),  # its own
        (("Cat", "cam"), "Cat"),  # in any case
        (("dog", "heatmap"), "heatmap"),  # a generic one
        (("Evidence", "dog"), "Evidence"),
        (("dog",), "dog"),  # the only one
        (("dog", "horse"), None),  # not to be guessed
    ],
)
def test_a_region_gets_the_classes_label_a_generic_one_the_only_one_or_none(names, label) -> None:
    assert control(labels(*names)).region_label("cat") == label


def test_a_choice_is_of_the_class_alone() -> None:
    choices = control('<Choice value="cam"/>', "Choices")
    assert choices.label_of("cat") is None


def test_a_label_means_its_alias_and_its_predicted_values() -> None:
    found = control(
        '<Label value="Pets" alias="pet" predicted_values="tabby, Egyptian cat"/><Label value="x"/>'
    )
    assert [found.label_of(name) for name in ("tabby", "egyptian CAT", "Pets", "pet")] == [
        "pet"
    ] * 4
    assert found.label_of("lynx") is None


def test_a_value_is_read_from_the_task() -> None:
    (image,) = images_in(CONFIG)
    assert image.source({"image": "/data/upload/1/a.jpg"}) == "/data/upload/1/a.jpg"
    nested = images_in(CONFIG.replace('"$image"', '"https://h/$photo.file?x=1"'))[0]
    assert nested.source({"photo": {"file": "a.jpg"}}) == "https://h/a.jpg?x=1"
    for data in ({}, {"image": ""}, {"image": None}, {"image": 3}):
        with pytest.raises(InvalidImageData, match=r"\$image"):
            image.source(data)


def test_extra_parameters_are_options_and_labels() -> None:
    given = '{"method": "layercam", "layer": "features.3", "labels": {"tabby": "cat"}}'
    parameters = parameters_in(given)
    assert (parameters.options.method, parameters.options.layer) == ("layercam", ["features.3"])
    assert parameters.names_of("tabby") == ("cat",)
    assert parameters.names_of("lynx") == ("lynx",)
    for nothing in (None, "", {}):
        assert parameters_in(nothing).options.method == "gradcam"


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"methods": "gradcam"}, "'methods'"),
        ({"method": "magic"}, "method"),
        ({"threshold": 2}, "threshold"),
        ({"labels": ["cat"]}, "labels"),
        ("{", "JSON"),
        ("[1]", "object"),
    ],
)
def test_extra_parameters_that_mean_nothing_are_refused(extra, said: str) -> None:
    with pytest.raises(InvalidOption, match=said):
        parameters_in(extra)


@pytest.mark.parametrize(
    ("extra", "version"),
    [
        ({}, "tiny-000000000000-gradcam-features"),
        ({"method": "layercam"}, "tiny-000000000000-layercam-features"),
        (
            {"layer": ["features.0", "features.3"]},
            "tiny-000000000000-gradcam-features.0+features.3",
        ),
        ({"method": "rise"}, "tiny-000000000000-rise-input"),
        (
            {"threshold": 0.25, "fit": "pad"},
            "tiny-000000000000-gradcam-features-threshold0.25-pad",
        ),
    ],
)
def test_the_version_says_model_weights_method_and_layer(extra, version: str) -> None:
    model = loaded(SmallNet())
    assert model_version(model, parameters_in(extra).options) == version


# ---- configurations made to keep the service busy


def view(inner: str) -> str:
    return f"<View>{inner}</View>"


def boxes(inner: str, name: str = "c", to_name: str = "i") -> str:
    return f'<RectangleLabels name="{name}" toName="{to_name}">{inner}</RectangleLabels>'


IMAGE = '<Image name="i" value="$image"/>'


def many_controls(count: int) -> str:
    others = "".join(boxes(labels("a"), f"c{n}", f"x{n}") for n in range(count))
    return view(IMAGE + others + boxes(labels("a")))


def many_labels(count: int) -> str:
    values = [f"label {n}" for n in range(count)]
    return view(IMAGE + boxes(labels(*values)))


def many_names(count: int) -> str:
    names = ",".join(f"n{n}" for n in range(count))
    return view(IMAGE + boxes(f'<Label value="a" predicted_values="{names}"/>'))


def many_to_names(count: int) -> str:
    names = ",".join(f"x{n}" for n in range(count))
    return view(IMAGE + boxes(labels("a"), to_name=f"{names},i,i,i"))


def many_images(count: int) -> str:
    images = "".join(f'<Image name="x{n}" value="$a"/>' for n in range(count))
    return view(images + IMAGE + boxes(labels("a")))


@pytest.mark.parametrize(
    "make", [many_controls, many_labels, many_names, many_to_names, many_images]
)
def test_reading_a_config_takes_time_in_proportion_to_it(make) -> None:
    """0.99 MB of it stopped the service for 4.2 seconds."""
    few, many = (lines_run(images_in, make(n)) for n in (400, 1600))
    assert few > 400 or make is many_names
    assert many <= 4.5 * few
    (image,) = images_in(make(1600))
    assert len(image.controls) == 1


def test_finding_a_label_takes_the_same_time_among_many() -> None:
    few, many = (images_in(many_labels(n))[0].controls[0] for n in (10, 5000))
    assert many.label_of("Label 4999") == "label 4999"
    assert lines_run(many.label_of, "label 4999") == lines_run(few.label_of, "label 9")


HOSTILE = {
    "tags": (many_labels(10_000), "10000 tags"),
    "attributes": ("<View " + "a='1' " * 50_001 + "/>", "50000 attributes"),
    "names": (many_names(50_002), "50000 names"),
    "depth": ("<View>" * 65 + "</View>" * 65, "64 tags deep"),
    "depth without end": ("<a>" * 10_000, "64 tags deep"),
    "pairs": (
        view(IMAGE + "".join(boxes(labels("a"), f"c{n}") for n in range(257))),
        "256 pairs",
    ),
    "images": (
        view(
            "".join(f'<Image name="x{n}" value="$a"/>' for n in range(17))
            + boxes(labels("a"), to_name=",".join(f"x{n}" for n in range(17)))
        ),
        "16 Image tags",
    ),
    "one name twice": (view(IMAGE + IMAGE + boxes(labels("a"))), "two Image tags"),
    "namespaces": ("<View " + "xmlns:a='1' " * 11 + "/>", "namespaces"),
    "an entity": ('<!DOCTYPE v [<!ENTITY a "aa">]><v>&a;</v>', "document type"),
    "an unknown entity": ("<View>&a;</View>", "not XML"),
}


@pytest.mark.parametrize(("config", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_config_without_end_is_refused(config: str, words: str) -> None:
    with pytest.raises(InvalidOption, match=words):
        images_in(config)


@pytest.mark.parametrize("value", ["$a$a", "http://h/$a/$b", "$a" * 500_000, "x" * 3000 + "$a"])
def test_an_image_is_one_variable(value: str) -> None:
    """Half a megabyte of `$a` and half a megabyte behind it would be 125 GB."""
    config = view(f'<Image name="i" value="{value}"/>' + boxes(labels("a")))
    with pytest.raises(InvalidOption, match="one variable"):
        images_in(config)


def test_a_value_of_a_task_is_not_read_for_variables() -> None:
    (image,) = images_in(view('<Image name="i" value="p/$a/s"/>' + boxes(labels("a"))))
    assert image.source({"a": "$a$a"}) == "p/$a$a/s"
    (plain,) = images_in(view('<Image name="i" value="/data/a.jpg"/>' + boxes(labels("a"))))
    assert plain.source({}) == "/data/a.jpg"


def test_a_label_belongs_to_the_control_around_it() -> None:
    inner = boxes(labels("b"), "inner")
    (image,) = images_in(view(IMAGE + boxes(labels("a") + inner + labels("c"), "outer")))
    found = {each.name: [label.name for label in each.labels] for each in image.controls}
    assert found == {"outer": ["a", "c"], "inner": ["b"]}


# ---- what is kept of projects


def test_what_is_kept_of_projects_has_a_bound_in_bytes() -> None:
    """A thousand projects of 1 MiB each were kept."""
    known = LabelStudio()
    for number in range(3000):
        known.remember(f"{number}.1", b"x" * 60_000)
        assert known.bytes_kept <= 4 << 20
    assert known.extra_of("2999.1") == b"x" * 60_000
    assert known.extra_of("2930.1") is None
    for number in range(3000):
        known.remember(f"{number}.1", b"{}")
    assert known.extra_of("1999.1") is None
    assert known.extra_of("2000.1") == b"{}"
    known.remember("2000.1", b"")
    assert known.extra_of("2000.1") is None
    known.remember("y" * 2_000_000, b"{}")
    assert known.bytes_kept == 0
