import copy
import json
import re
import shutil
import sys
import types

import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.dataset import ConcatDataset, RepeatDataset, pseudo_collate
from mmengine.registry import TRANSFORMS
from PIL import Image
from pycocotools import mask
from torch.utils.data import DataLoader

from gfnet_dense.data import check_data
from gfnet_dense.data.build import build_dataset
from gfnet_dense.data.coco import check_file, check_objects, check_part, is_coco
from gfnet_dense.data.contents import parts, read_contents
from gfnet_dense.data.errors import DataError, Fault, Note, raise_first
from gfnet_dense.data.report import inspect
from gfnet_dense.demo import write_digits
from gfnet_dense.durable.data_checks import CheckedDataset

NAMES = ('cat', 'dog')


@pytest.fixture
def content() -> dict:
    """Return annotations of three images: a crowd, a box half outside, nothing at all."""
    square = [[2, 2, 12, 2, 12, 12, 2, 12]]
    crowd = {'size': [20, 40], 'counts': [100, 300, 400]}
    return {
        'images': [
            {'id': i, 'file_name': f'{i}.jpg', 'width': 40, 'height': 20} for i in (7, 3, 5)
        ],
        'categories': [{'id': 4, 'name': 'cat'}, {'id': 2, 'name': 'dog'}],
        'annotations': [
            annotation(1, 7, 2, [2, 2, 10, 10], square),
            annotation(2, 7, 4, [0, 0, 20, 20], crowd, iscrowd=1),
            annotation(3, 3, 4, [30, 10, 30, 30], square),
        ],
    }


def annotation(number, image, category, box, segmentation, iscrowd=0) -> dict:
    return {
        'id': number, 'image_id': image, 'category_id': category, 'bbox': box,
        'area': box[2] * box[3], 'iscrowd': iscrowd, 'segmentation': segmentation,
    }  # fmt: skip


@pytest.fixture
def build(tmp_path, content):
    """Return a function that writes images and `content`, and builds the data set."""

    def build(classes=NAMES, pipeline=(), **options):
        for image in content['images']:
            pixels = np.zeros((image['height'], image['width'], 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / image['file_name'])
        (tmp_path / 'annotations.json').write_text(json.dumps(content))
        return CocoDataset(
            data_root=str(tmp_path),
            ann_file='annotations.json',
            data_prefix=dict(img=''),
            metainfo=dict(classes=classes),
            pipeline=list(pipeline),
            **options,
        )

    return build


def check_coco(dataset, use: str = 'train') -> None:
    for part in parts(dataset):
        if is_coco(part):
            raise_first(check_part(part, use))


def notes(dataset) -> list[str]:
    """Return what is no fault and still said."""
    return [note for note in check_part(dataset, 'train') if isinstance(note, Note)]


def test_crowds_images_without_objects_and_boxes_half_outside_are_no_error(build):
    dataset = build(pipeline=[dict(type='mmdet.LoadAnnotations', with_mask=True)])
    check_coco(dataset)
    assert notes(dataset) == []


def test_the_embedded_data_and_segmentation_pass(tmp_path):
    from mmseg.datasets import BaseSegDataset

    from gfnet_dense.demo import CLASSES

    root = write_digits(tmp_path / 'digits', num_training=2, num_validation=1)
    check_coco(
        CocoDataset(
            data_root=str(root),
            ann_file='annotations/instances_training.json',
            data_prefix=dict(img='images/training'),
            metainfo=dict(classes=CLASSES[1:]),
            pipeline=[],
        )
    )
    check_coco(BaseSegDataset(data_root=str(root), data_prefix=dict(img_path='images/training')))


@pytest.mark.parametrize('wrap', [
    lambda dataset: dataset,
    lambda dataset: RepeatDataset(dataset, times=3),
    lambda dataset: ConcatDataset([dataset]),
])  # fmt: skip
def test_missing_images_are_counted_and_the_first_are_named(build, tmp_path, wrap):
    dataset = wrap(build())
    check_coco(dataset)
    (tmp_path / '3.jpg').unlink()
    (tmp_path / '7.jpg').unlink()
    with pytest.raises(DataError, match=r'2 of 3 images .*annotations\.json .*/7\.jpg, .*/3\.jpg:'):
        check_coco(dataset)


def test_many_missing_images_are_not_all_named(build, content, tmp_path):
    content['images'] += [dict(content['images'][0], id=i, file_name=f'{i}.jpg') for i in (8, 9)]
    dataset = build()
    for path in tmp_path.glob('*.jpg'):
        path.unlink()
    with pytest.raises(DataError) as error:
        check_coco(dataset)
    assert str(error.value).count('.jpg') == 3
    assert ' and 2 more: ' in str(error.value)


def test_images_that_are_filtered_out_need_not_be_there(build, tmp_path):
    dataset = build(filter_cfg=dict(filter_empty_gt=True))
    (tmp_path / '5.jpg').unlink()
    check_coco(dataset)


def test_classes_that_the_file_does_not_have(build):
    """mmdet gives no error: it numbers the categories that match, so that dog would be cat."""
    dataset = build(('cat', 'horse', 'dog'))
    assert len(dataset.cat_ids) == 2
    with pytest.raises(DataError, match=r'1 of 3 classes .*: horse; it has cat, dog: .*metainfo'):
        check_coco(dataset)
    with pytest.raises(DataError, match='78 of 80 classes'):
        check_coco(build(CocoDataset.METAINFO['classes']))


def test_classes_in_another_order_than_the_file_lists_them(build):
    """Nor here: labels follow the file, so that each would bear the other's name."""
    dataset = build(('dog', 'cat'))
    labels = {i['bbox_label'] for d in dataset for i in d['instances'] if i['ignore_flag'] == 0}
    assert labels == {0, 1}
    with pytest.raises(DataError, match=r"another order.*\('cat', 'dog'\)"):
        check_coco(dataset)


def test_some_of_the_classes_are_enough(build):
    check_coco(build(('dog',)))


def test_a_single_name_without_its_comma(build):
    with pytest.raises(DataError, match=r"text 'dog'.*\('dog',\)"):
        check_coco(build('dog'))


def test_category_ids_that_the_file_does_not_declare(build, content):
    content['annotations'][0]['category_id'] = 0
    with pytest.raises(DataError, match=r'1 of 3 annotations .* category_id .*: 0; they have 2, 4'):
        check_coco(build())


@pytest.mark.parametrize(
    'box', [[40, 0, 5, 5], [-9, 0, 9, 9], [0, 20, 5, 5], [3, 3, 0, 5], [3, 3, 5, 0.5]]
)
def test_boxes_without_area_in_the_image_are_counted(build, content, box):
    content['annotations'][0]['bbox'] = box
    content['annotations'][0]['area'] = 25
    dataset = build()
    check_coco(dataset)
    (note,) = notes(dataset)
    assert note.startswith('1 of 3 boxes')
    # As many as the data set drops.
    assert sum(len(info['instances']) for info in dataset) == 2


def test_a_file_of_images_alone_passes(build, content):
    """As COCO's test-dev is published."""
    del content['annotations']
    check_coco(dataset := build(test_mode=True))
    assert notes(dataset) == []


def build_checked(dataset):
    """Return the data set as a run builds it, of its config."""
    return CheckedDataset(
        dict(
            type='mmdet.CocoDataset',
            data_root=dataset.data_root,
            ann_file='annotations.json',
            data_prefix=dict(img=''),
            metainfo=dict(classes=NAMES),
            pipeline=[],
            filter_cfg=dict(filter_empty_gt=True),
        ),
    )


def test_annotations_of_no_image(build, content):
    for some in content['annotations']:
        some['image_id'] += 100
    dataset = build(test_mode=True)
    message = r'3 of 3 annotations in .*annotations\.json .* image_id .* 3 images has, such as 107:'
    with pytest.raises(DataError, match=message):
        check_coco(dataset)
    with pytest.raises(DataError, match=message):  # mmengine: need at least one array
        build_checked(dataset)
    content['annotations'][0]['image_id'] -= 100
    check_coco(dataset := build())
    assert notes(dataset)[-1].startswith('2 of 3 boxes')
    assert 'an image_id that none' in notes(dataset)[-1]


def test_nothing_is_left_of_a_file_without_objects(build, content):
    content['annotations'] = []
    check_coco(dataset := build(test_mode=True))
    message = r'no images are left .*json has 3 images and 0 annotations: .* filter_cfg'
    with pytest.raises(DataError, match=message):
        build_checked(dataset)


@pytest.mark.parametrize('key', ['image_id', 'category_id', 'bbox', 'area'])
def test_annotations_that_lack_something(build, content, tmp_path, key):
    dataset = build()
    del content['annotations'][1][key]
    (tmp_path / 'annotations.json').write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf'1 of 3 annotations in .* have no {key}, .* ids 2:'):
        build_checked(dataset)


@pytest.mark.parametrize('box', [[2, 2, float('nan'), 10], [2, 2, float('inf'), 10]])
def test_boxes_that_are_not_finite(build, content, box):
    content['annotations'][2]['bbox'] = box
    with pytest.raises(DataError, match=r'1 of 3 annotations .* finite numbers, .* ids 3:'):
        check_coco(build())


def test_what_has_nothing_to_do_with_annotations_is_passed_on(build):
    dataset = build()
    with pytest.raises(KeyError, match='NoTransform'):
        CheckedDataset(
            dict(
                type='mmdet.CocoDataset',
                data_root=dataset.data_root,
                ann_file='annotations.json',
                pipeline=[dict(type='NoTransform')],
            ),
        )


def test_masks_that_the_pipeline_loads_must_be_there(build, content):
    del content['annotations'][2]['segmentation']
    check_coco(build(pipeline=[dict(type='mmdet.LoadAnnotations', with_bbox=True)]))
    with pytest.raises(DataError, match=r'1 objects .* no segmentation.*RetinaNet'):
        check_coco(build(pipeline=[dict(type='mmdet.LoadAnnotations', with_mask=True)]))


def test_a_part_may_have_no_objects(build, content, tmp_path):
    positives = build()
    content['annotations'] = []
    (tmp_path / 'annotations.json').rename(tmp_path / 'positives.json')
    positives.ann_file = str(tmp_path / 'positives.json')
    negatives = build(filter_cfg=dict(filter_empty_gt=False))
    contents = read_contents(negatives)
    (alone,) = check_objects(negatives, contents, 'train')
    (beside_others,) = check_objects(negatives, contents, 'train', alone=False)
    subset = build(filter_cfg=dict(filter_empty_gt=False), indices=2)
    (of_subset,) = check_objects(subset, read_contents(subset), 'train')
    assert [type(found) for found in (alone, beside_others, of_subset)] == [Fault, Note, Note]
    loader = DataLoader(ConcatDataset([positives, negatives]), collate_fn=pseudo_collate)
    assert inspect('train', loader).faults == []


@TRANSFORMS.register_module()
class FromBytes:
    """A transform of a user that finds images elsewhere than in files."""

    def __call__(self, results):
        return dict(results, img=np.zeros((20, 40, 3), np.uint8))


def test_images_that_a_step_of_the_user_loads_need_not_be_files(build, tmp_path):
    dataset = build(pipeline=[dict(type='FromBytes')])
    for path in tmp_path.glob('*.jpg'):
        path.unlink()
    check_coco(dataset)


def test_data_sets_of_other_layouts_are_not_read_as_coco():
    class LVISDataset:
        cat2label, ann_file = {}, 'lvis.json'

    class MyObjects(LVISDataset):
        pass

    class XMLDataset:
        cat2label, ann_file = {}, 'train.txt'

    class Panoptic:
        cat2label, ann_file = {}, 'panoptic.json'

    found = [is_coco(kind()) for kind in (LVISDataset, MyObjects, XMLDataset, Panoptic)]
    assert found == [False, False, False, True]


@pytest.fixture
def panoptic(tmp_path, monkeypatch):
    """Return a file of two images of two segments, and a function that builds its data set."""
    # mmdet asks for a package that comes from no registry. Of it the loading step takes this.
    utils = types.ModuleType('panopticapi.utils')
    utils.rgb2id = lambda colours: colours.astype(np.uint32) @ np.array([1, 256, 256**2], np.uint32)
    package = types.ModuleType('panopticapi')
    package.utils = utils
    monkeypatch.setitem(sys.modules, 'panopticapi', package)
    monkeypatch.setitem(sys.modules, 'panopticapi.utils', utils)
    segments = [
        dict(id=300, category_id=7, bbox=[0, 0, 20, 20], area=400, iscrowd=0),
        dict(id=70000, category_id=9, bbox=[20, 0, 20, 20], area=400, iscrowd=0),
    ]
    content = {
        'images': [dict(id=i, file_name=f'{i}.jpg', width=40, height=20) for i in (1, 2)],
        'categories': [dict(id=7, name='cat', isthing=1), dict(id=9, name='sky', isthing=0)],
        'annotations': [
            dict(image_id=i, file_name=f'{i}.png', segments_info=copy.deepcopy(segments))
            for i in (1, 2)
        ],
    }
    for i in (1, 2):
        ids = np.where(np.arange(40) < 20, 300, 70000) * np.ones((20, 1), int)
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=-1)
        Image.fromarray(colours.astype(np.uint8)).save(tmp_path / f'{i}.png')
        Image.fromarray(colours.astype(np.uint8)).save(tmp_path / f'{i}.jpg')

    def find() -> list:
        (tmp_path / 'panoptic.json').write_text(json.dumps(content))
        steps = [dict(type='LoadImageFromFile'), dict(type='LoadPanopticAnnotations'),
                 dict(type='PackDetInputs')]  # fmt: skip
        names = dict(classes=('cat', 'sky'), thing_classes=('cat',), stuff_classes=('sky',))
        dataset = dict(
            type='CocoPanopticDataset', data_root=str(tmp_path), ann_file='panoptic.json',
            data_prefix=dict(img='', seg=''), metainfo=names, pipeline=steps,
        )  # fmt: skip
        sampler = dict(type='DefaultSampler', shuffle=False)
        loader = dict(batch_size=2, num_workers=0, sampler=sampler, dataset=dataset)
        (report,) = check_data(Config(dict(default_scope='mmdet', train_dataloader=loader)))
        if not report.faults:
            sample = report.loader.dataset[0]['data_samples']
            assert len(sample.gt_instances) == (content['categories'][0]['isthing'] == 1)
            assert sample.gt_sem_seg.sem_seg.unique().tolist() == [0, 1]
        return report.findings

    return content, find


def test_panoptic_data_pass(panoptic):
    content, find = panoptic
    assert all('do not occur' in note for note in find())  # the stuff is no object
    content['categories'][0]['isthing'] = 0
    assert not any(isinstance(finding, Fault) for finding in find())


@pytest.mark.parametrize(
    ('spoil', 'says'),
    [
        (lambda c, root: c['categories'][1].pop('isthing'), '1 of 2 categories .* no isthing'),
        (lambda c, root: c['annotations'][1].pop('image_id'), '2 of 4 annotations .* no image_id'),
        *[
            (lambda c, root, k=key: c['annotations'][0]['segments_info'][1].pop(k), f'no {key}')
            for key in ('id', 'category_id', 'bbox', 'area')
        ],
        (
            lambda c, root: c['annotations'][0]['segments_info'][0].update(category_id=8),
            'category_id that is not one of its categories: 8',
        ),
        (lambda c, root: (root / '2.png').unlink(), r'no map of segments, first .*2\.png'),
        (lambda c, root: (root / '2.png').write_bytes(b''), r'2\.png cannot be read'),
        (lambda c, root: shutil.copy(root / '2.jpg', root / '2.png'), 'has its id in a pixel'),
        (lambda c, root: Image.new('RGB', (20, 20)).save(root / '1.png'), r'1\.png has 20x20'),
    ],
)  # fmt: skip
def test_faulty_panoptic_data(panoptic, tmp_path, spoil, says):
    content, find = panoptic
    spoil(content, tmp_path)
    faults = [finding for finding in find() if isinstance(finding, Fault)]
    assert len(faults) == 1 and re.search(says, faults[0]), faults


def test_a_panoptic_file_for_boxes(panoptic, tmp_path):
    panoptic[1]()  # writes it
    dataset = dict(type='CocoDataset', data_root=str(tmp_path), ann_file='panoptic.json',
                   data_prefix=dict(img=''), metainfo=dict(classes=('cat', 'sky')))  # fmt: skip
    with pytest.raises(DataError, match='has panoptic segments, other than CocoDataset reads'):
        build_dataset(dataset)


@pytest.mark.parametrize(
    ('spoil', 'says'),
    [
        (lambda c: c['annotations'].append(None), '1 of 4 annotations in .* are no dicts'),
        (lambda c: c['images'][0].update(file_name=7), 'file_name of a wrong type, first 7'),
        (lambda c: c['annotations'][0].update(image_id=[7]), r'image_id of a wrong type, first .7'),
        (lambda c: c['categories'][0].update(id={}), 'id of a wrong type, first {}'),
    ],
)
def test_values_of_wrong_types_are_named(content, spoil, says):
    spoil(content)
    faults = [f for f in check_file(content, 'a.json') if isinstance(f, Fault)]
    assert len(faults) == 1 and re.search(says, faults[0]), faults


def test_a_faulty_file_inside_wrappers_is_named(build, content, tmp_path):
    build()
    del content['images'][0]['width']
    (tmp_path / 'faulty.json').write_text(json.dumps(content))
    inner = [
        dict(
            type='mmdet.CocoDataset', data_root=str(tmp_path), ann_file=file,
            data_prefix=dict(img=''), metainfo=dict(classes=NAMES), pipeline=[],
        )
        for file in ('annotations.json', 'faulty.json')
    ]  # fmt: skip
    repeated = [dict(type='RepeatDataset', times=2, dataset=each) for each in inner]
    with pytest.raises(DataError, match=r'1 of 3 images in .*faulty\.json have no width'):
        build_dataset(dict(type='ConcatDataset', datasets=repeated))


def test_areas_of_0_are_named(build, content):
    for some in content['annotations']:
        some['area'] = 0
    with pytest.raises(DataError, match=r'all 3 annotations in .* have an area of 0'):
        check_coco(build(filter_cfg=dict(filter_empty_gt=False)))


def test_a_first_polygon_of_two_points_beside_a_whole_one(content):
    polygons = [[2, 2, 9, 9], [1, 1, 9, 1, 9, 9, 1, 9]]
    with pytest.raises(TypeError):
        mask.frPyObjects(polygons, 20, 40)
    content['annotations'][0]['segmentation'] = polygons
    assert [*check_file(content, 'a.json', True, 'train')] == []
    (fault,) = check_file(content, 'a.json', True, 'evaluator')
    assert isinstance(fault, Fault)
    assert 'first polygon' in fault
