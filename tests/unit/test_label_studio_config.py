"""What a labeling config has room for, and which label a class gets."""

from __future__ import annotations

import pytest
from tiny import SmallNet, loaded

from service.errors import InvalidImageData, InvalidOption
from service.integrations.label_studio_config import images_in, model_version, parameters_in

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
