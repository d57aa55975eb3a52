"""OpenMMLab's inference functions, as a user calls them who imports nothing of ours.

inference.py detection|segmentation CONFIG CHECKPOINT IMAGE writes what they find as JSON.
"""

import json
import sys


def detection(config: str, checkpoint: str, image: str) -> dict:
    from mmdet.apis import DetInferencer, inference_detector, init_detector

    model = init_detector(config, checkpoint, device='cpu')
    found = inference_detector(model, image).pred_instances
    inferencer = DetInferencer(config, checkpoint, device='cpu', show_progress=False)
    # Without a config: the checkpoint has its own in it.
    alone = DetInferencer(weights=checkpoint, device='cpu', show_progress=False)
    return {
        'meta': [model.dataset_meta, alone.model.dataset_meta, inferencer.visualizer.dataset_meta],
        'init_detector': {key: found[key].tolist() for key in ('bboxes', 'scores', 'labels')},
        'masks': [int(mask.sum()) for mask in found.get('masks', ())],
        'DetInferencer': inferencer(image)['predictions'][0],
        'alone': alone(image)['predictions'][0],
    }


def segmentation(config: str, checkpoint: str, image: str) -> dict:
    from mmseg.apis import MMSegInferencer, inference_model, init_model

    model = init_model(config, checkpoint, device='cpu')
    inferencer = MMSegInferencer(config, checkpoint, device='cpu', show_progress=False)
    return {
        'meta': [model.dataset_meta, inferencer.model.dataset_meta],
        'init_model': inference_model(model, image).pred_sem_seg.data[0].tolist(),
        'MMSegInferencer': inferencer(image)['predictions'].tolist(),
    }


if __name__ == '__main__':
    task, *arguments = sys.argv[1:]
    print('\n' + json.dumps(globals()[task](*arguments)))
